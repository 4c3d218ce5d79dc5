"""LoRA files of families with a transformer: diffusers and ComfyUI compute what the run's own model computes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dreambooth.config.enums import Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.errors import UserError
from dreambooth.inference.loras import find_loras
from dreambooth.models import families, loading, lora
from dreambooth.models.components import Components
from dreambooth.serialization import lora_files
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.serialization.single_file import to_file
from tests.support.tiny_models import FEWER_FAST, FLOW_FAMILIES

SAME = 2e-4  # difference of pictures in [0, 1] that rounding may cause, see test_lora_files.py
# The layers that diffusers' converters of ComfyUI's layout read; Stable Diffusion 3.5 has no converter.
CONVERTED = {"z_image": Targets.transformer, "flux2_klein": Targets.transformer, "qwen_image": Targets.all}


def load(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def taught(pipeline: Any, kind: MethodKind, targets: Targets) -> tuple[loading.TrainedModel, dict[str, lora.LowRank]]:
    """The pipeline's transformer with an adapter that changes its pictures, and the adapter."""
    family = families.of_pipeline(pipeline)
    model = loading.TrainedModel(family, {"transformer": pipeline.transformer}, 8)
    method = Method(name=kind.value, kind=kind, rank=2, alpha=3, targets=targets)
    lora.inject(model, method, family.adapter_targets, 1, Dtype.fp32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, lora.adapter_weights(model)


def write(folder: Path, model: loading.TrainedModel, adapters: dict[str, lora.LowRank], config: Any) -> dict[str, Path]:
    parts = Components(model.family, SimpleNamespace(config=config), [], None, [], {})
    lora_files.write(folder, adapters, lora.base_scales(model, adapters), parts, "toy", {})
    return {"diffusers": folder / ADAPTER, "comfyui": folder / "webui/toy.safetensors"}


def draw(pipeline: Any) -> np.ndarray:
    family = families.of_pipeline(pipeline)
    with torch.no_grad():
        return pipeline(prompt="a photo of a zwx toy", num_inference_steps=2, height=32, width=32,
                        output_type="np", generator=torch.Generator().manual_seed(4),
                        **family.sampling_arguments(pipeline), **family.guidance_arguments(3.0, 1)).images


@pytest.mark.parametrize("kind", [MethodKind.lora, MethodKind.dora])
@pytest.mark.parametrize("name", FEWER_FAST)
def test_diffusers_draws_the_same_pictures(name: str, kind: MethodKind, flow_bases: dict[str, Path],
                                           tmp_path: Path) -> None:
    ours, theirs = load(flow_bases[name]), load(flow_bases[name])
    base = draw(theirs)
    files = write(tmp_path, *taught(ours, kind, Targets.transformer), ours.transformer.config)
    theirs.load_lora_weights(tmp_path, weight_name=ADAPTER)
    wanted = draw(ours)
    assert np.abs(wanted - base).max() > 20 * SAME, "the adapter changes nothing"
    assert np.abs(draw(theirs) - wanted).max() < SAME
    if kind is MethodKind.lora and name in CONVERTED:
        theirs = load(flow_bases[name])
        theirs.load_lora_weights(files["comfyui"].parent, weight_name=files["comfyui"].name)
        assert np.abs(draw(theirs) - wanted).max() < SAME


@pytest.mark.parametrize("name", FLOW_FAMILIES)
def test_a_file_that_diffusers_would_read_in_part_is_refused(name: str, flow_bases: dict[str, Path], tmp_path: Path
                                                           ) -> None:
    """All other layers of method.targets=all are read."""
    pipeline = load(flow_bases[name])
    model, adapters = taught(pipeline, MethodKind.lora, Targets.all)
    files = write(tmp_path, model, adapters, pipeline.transformer.config)
    if name == "qwen_image":  # diffusers reads every layer
        assert find_loras([str(files["comfyui"])], [1.0])[0].name == "toy"
    else:
        with pytest.raises(UserError, match=rf"a part out: type lora=DIR, the folder with its {ADAPTER}"):
            find_loras([str(files["comfyui"])], [1.0])
    if name in CONVERTED:
        lacks = model.family.diffusers_lacks
        known = {key: value for key, value in load_file(files["comfyui"]).items() if not lacks.match(key)}
        wanted = {module for entry in model.family.kohya_entries(adapters, pipeline.transformer.config)
                  if not lacks.match(entry.key) for module in entry.names}
        converted = type(pipeline).lora_state_dict(known)
        assert {key.removesuffix(".lora_A.weight") for key in converted if "lora_A" in key} == wanted
        assert find_loras([str(tmp_path)], [1.0])[0].name == "toy"


@pytest.mark.parametrize("name", CONVERTED)
def test_diffusers_converts_the_layout_of_comfyui_to_the_same_adapters(name: str, flow_bases: dict[str, Path],
                                                                     tmp_path: Path) -> None:
    pipeline = load(flow_bases[name])
    files = write(tmp_path, *taught(pipeline, MethodKind.lora, CONVERTED[name]), pipeline.transformer.config)
    converted = type(pipeline).lora_state_dict(load_file(files["comfyui"]))
    wanted = load_file(files["diffusers"])
    assert converted.keys() == wanted.keys()
    if name == "flux2_klein":  # this converter also undoes the block-diagonal matrices
        assert not [key for key in wanted if not torch.equal(converted[key], wanted[key])]
    for key in (key for key in wanted if key.endswith("lora_A.weight")):
        up = key.replace("lora_A", "lora_B")
        assert torch.allclose(converted[up] @ converted[key], wanted[up] @ wanted[key], atol=1e-6), key


def as_comfyui(tensors: dict[str, Tensor], lora_file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a single file with a LoRA file applied, computed as ComfyUI does.

    Written after comfy/lora.py (model_lora_keys_unet: the key of a weight) and comfy/weight_adapter/lora.py.
    """
    changed, left = dict(tensors), set(lora_file)
    for key, weight in tensors.items():
        name = "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        suffixes = [".lora_up.weight", ".lora_down.weight", ".alpha", ".dora_scale"]
        if not key.endswith(".weight") or name + suffixes[0] not in lora_file:
            continue
        up, down, alpha, scale = (lora_file.get(name + suffix) for suffix in suffixes)
        assert up is not None and down is not None and alpha is not None
        left -= {name + suffix for suffix in suffixes}
        whole = weight + alpha.item() / down.shape[0] * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if scale is not None:
            assert scale.shape[0] == weight.shape[0]  # the condition of ComfyUI for norms of rows
            norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
            whole = whole * scale / norm
        changed[key] = whole
    assert not left, "ComfyUI does not load these keys"
    return changed


@pytest.mark.parametrize("kind", [MethodKind.lora, MethodKind.dora])
@pytest.mark.parametrize("name", FLOW_FAMILIES)
def test_comfyui_computes_the_weights_of_a_merged_model(name: str, kind: MethodKind, flow_bases: dict[str, Path],
                                                       tmp_path: Path) -> None:
    pipeline = load(flow_bases[name])
    config, state = pipeline.transformer.config, dict(pipeline.transformer.state_dict())
    family = families.of_pipeline(pipeline)
    entries = list(family.single_file.entries("transformer", state, config))
    model, adapters = taught(pipeline, kind, Targets.all)
    found = as_comfyui({entry.key: to_file(entry, [state[one] for one in entry.names]) for entry in entries},
                       load_file(write(tmp_path, model, adapters, config)["comfyui"]))
    for module, low in adapters.items():
        weight = module.removeprefix("transformer.") + ".weight"
        state[weight] = low.merged(state[weight])
    for entry in entries:
        wanted = to_file(entry, [state[one] for one in entry.names])
        assert torch.allclose(found[entry.key], wanted, atol=1e-5, rtol=1e-4), entry.key
    assert len(adapters) > 10
