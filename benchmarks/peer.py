"""Runs diffusers' train_dreambooth.py as it is and notes when its steps and class images are done.

    python benchmarks/peer.py NOTES.jsonl path/to/train_dreambooth.py ARGUMENTS...

The script is not ours, not edited and not in this repository. It needs torchvision.transforms, which cannot be
installed beside a PyTorch without it; the few transforms that it uses are stood in for here with Pillow, which is what
torchvision itself uses for pictures. Diffusers and transformers are imported first, so that they do not take the
stand-in for the real thing. Times come from the progress bars that the script keeps anyway.
"""

import importlib.machinery
import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    BILINEAR = Image.Resampling.BILINEAR


class Compose:
    def __init__(self, parts: Sequence[Callable[[Any], Any]]) -> None:
        self.parts = parts

    def __call__(self, picture: Any) -> Any:
        for part in self.parts:
            picture = part(picture)
        return picture


class Resize:
    """The short side to `size`."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.resample = size, interpolation.value

    def __call__(self, picture: Image.Image) -> Image.Image:
        short = min(picture.size)
        if short == self.size:
            return picture
        width, height = (int(side * self.size / short) for side in picture.size)
        return picture.resize((width, height), self.resample)


class RandomCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def corner(self, free: int) -> int:
        return int(torch.randint(free + 1, ()))

    def __call__(self, picture: Image.Image) -> Image.Image:
        left, top = (self.corner(side - self.size) for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))


class CenterCrop(RandomCrop):
    def corner(self, free: int) -> int:
        return round(free / 2)


class ToTensor:
    """(3, H, W) in [0, 1]."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8, copy=True))
        return pixels.permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.mean) / self.std


def stand_in() -> None:
    """Put torchvision.transforms in place, unless the real one is there."""
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    for part in (Compose, Resize, RandomCrop, CenterCrop, ToTensor, Normalize, InterpolationMode):
        setattr(transforms, part.__name__, part)
    package.transforms = transforms  # type: ignore[attr-defined]
    for module in (package, transforms):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


def noted(notes: Path) -> None:
    """Let the script's progress bars write a line for each update: what was counted, when, how many."""
    import tqdm.auto

    file = notes.open("a", buffering=1)

    class Noted(tqdm.auto.tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> Any:
            found = super().update(n)
            if self.desc.strip(": ") in ("Steps", "Generating class images") and not self.disable:
                file.write(json.dumps({"bar": self.desc.strip(": "), "time": time.time(), "done": n}) + "\n")
            return found

        def __iter__(self) -> Any:
            for item in self.iterable:
                yield item
                self.update()

    tqdm.auto.tqdm = Noted


def main() -> None:
    notes, script, *arguments = sys.argv[1:]
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DDPMScheduler,
        DiffusionPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import AutoTokenizer, CLIPTextModel  # noqa: F401

    stand_in()
    noted(Path(notes))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
