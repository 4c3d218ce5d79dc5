"""Weights of model folders, and their comparison bit for bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a diffusers folder, by part and name."""
    return {f"{path.parent.name}.{name}": value for path in sorted(folder.rglob("*.safetensors"))
            for name, value in load_file(path).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes and values are equal."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype is theirs[name].dtype and ours[name].equal(theirs[name]) for name in theirs)
