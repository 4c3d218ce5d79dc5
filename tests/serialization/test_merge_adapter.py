"""convert merges the adapter of a run into its base model, for programs that do not read its kind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.errors import UserError
from dreambooth.models.adapters.factors import LoKr
from dreambooth.serialization.convert import convert
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.serialization.merge_adapter import find_lone_adapter
from dreambooth.utils.assets import resolve_asset

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # 128 x 128


def adapter(folder: Path, layer: str = LAYER, **metadata: str) -> LoKr:
    """Write the file of a LoKr of one layer of the tiny base."""
    lokr = LoKr((torch.full((8, 8), 0.25),), (torch.eye(16),))
    (folder / "model").mkdir(parents=True)
    save_file({f"{layer}.lokr_w1": lokr.left[0], f"{layer}.lokr_w2": lokr.right[0]}, folder / "model" / ADAPTER,
              {"base_model": "package:tiny-sd"} | metadata)
    return lokr


def test_a_lokr_is_merged_into_a_folder_and_a_file(tmp_path: Path) -> None:
    lokr = adapter(tmp_path / "run")
    base = load_file(next(Path(resolve_asset("package:tiny-sd"), "unet").glob("*.safetensors")))
    convert(str(tmp_path / "run"), str(tmp_path / "out"), dtype="fp32")
    found = load_file(next((tmp_path / "out/unet").glob("*.safetensors")))
    changed = f"{LAYER.removeprefix('unet.')}.weight"
    for name, weight in base.items():
        wanted = lokr.merged(weight.float()) if name == changed else weight.float()
        assert found[name].equal(wanted), name
    convert(str(tmp_path / "run"), str(tmp_path / "model.safetensors"))
    single = load_file(tmp_path / "model.safetensors")
    assert any(tensor.shape == (128, 128) and tensor.equal(lokr.merged(base[changed].float()).to(base[changed]))
               for tensor in single.values())


def test_what_cannot_be_merged_is_a_sentence(tmp_path: Path) -> None:
    adapter(tmp_path / "other", "unet.nothing")
    with pytest.raises(UserError, match=r"lacks unet\.nothing: put back the model"):
        convert(str(tmp_path / "other"), str(tmp_path / "out"))
    adapter(tmp_path / "tokens", new_tokens='{"zwx": "hash"}')
    with pytest.raises(UserError, match=r"embeddings of its own for the word zwx.*: put the file"):
        convert(str(tmp_path / "tokens"), str(tmp_path / "out"))
    adapter(tmp_path / "gone", base_model="/nowhere")
    with pytest.raises(UserError, match="not on this machine: put it back"):
        convert(str(tmp_path / "gone"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="config would change nothing where an adapter is merged"):
        convert(str(tmp_path / "gone"), str(tmp_path / "out"), config="x")
    assert find_lone_adapter(tmp_path) is None
