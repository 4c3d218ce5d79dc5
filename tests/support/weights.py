"""Weights of model folders, and their comparison bit for bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dreambooth.serialization.export_layout import ADAPTER


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a diffusers folder, by part and name."""
    return {f"{path.parent.name}.{name}": value for path in sorted(folder.rglob("*.safetensors"))
            for name, value in load_file(path).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes and values are equal."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype is theirs[name].dtype and ours[name].equal(theirs[name]) for name in theirs)


def make_adapter(folder: Path, seed: int) -> None:
    """Write a LoRA for the tiny base that changes pictures visibly, as a run exports it."""
    folder.mkdir(parents=True)
    layer, random = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v", torch.Generator().manual_seed(seed)
    save_file({f"{layer}.lora_A.weight": torch.randn(4, 128, generator=random),
               f"{layer}.lora_B.weight": torch.randn(128, 4, generator=random)}, folder / ADAPTER)
