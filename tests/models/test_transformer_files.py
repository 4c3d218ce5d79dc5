"""Single files of transformers: their keys and tensors are those that diffusers' own converters read."""

from typing import Any

import pytest
import torch

from dreambooth.models import families
from dreambooth.models.families import flux2_klein, qwen_image, sd35, z_image
from dreambooth.models.families.family import Family
from dreambooth.serialization.single_file import to_file


def flux2() -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=12,
        dual_attention_layers=(0, 1), qk_norm="rms_norm")


def zimage() -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 8, 8])  # type: ignore[arg-type]


def qwen() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6))


@pytest.mark.parametrize("family, build", [
    (flux2_klein.FAMILY, flux2), (sd35.FAMILY, sd3), (z_image.FAMILY, zimage), (qwen_image.FAMILY, qwen),
], ids=["flux2_klein", "sd35", "z_image", "qwen_image"])
def test_diffusers_reads_every_tensor_back(family: Family, build: Any) -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    model = build()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
    entries = list(family.single_file.entries("transformer", state, model.config))
    file = {entry.key: to_file(entry, [state[name] for name in entry.names]) for entry in entries}
    assert len(file) == len(entries)
    assert family.single_file.matches(frozenset(map(families.canonical_key, file)))
    again = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"](checkpoint=dict(file))
    assert again.keys() == state.keys()
    assert not [name for name in state if not torch.equal(again[name], state[name])]
