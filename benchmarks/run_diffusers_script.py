"""Runs diffusers' train_dreambooth.py unchanged, and logs the times at which steps and class images are completed.

    python benchmarks/run_diffusers_script.py LOG.jsonl path/to/train_dreambooth.py ARGUMENTS...

The script is not part of this repository. It needs torchvision.transforms, and torchvision is not installed here. This
file therefore provides replacements of the few transforms that the script uses. They call Pillow, as torchvision does
for images. Diffusers and transformers are imported first, so that they do not detect the replacement as a
real torchvision. The times come from the script's own progress bars.
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
    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """Scale the shorter side to `size`."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.resample = size, interpolation.value

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        if short == self.size:
            return image
        width, height = (int(side * self.size / short) for side in image.size)
        return image.resize((width, height), self.resample)


class RandomCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def corner(self, free: int) -> int:
        return int(torch.randint(free + 1, ()))

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (self.corner(side - self.size) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class CenterCrop(RandomCrop):
    def corner(self, free: int) -> int:
        return round(free / 2)


class ToTensor:
    """Convert an RGB image to a tensor (3, H, W) in [0, 1]."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8, copy=True))
        return pixels.permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.mean) / self.std


def install_torchvision_replacement() -> None:
    """Register modules `torchvision` and `torchvision.transforms` that contain the classes of this file."""
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    for transform in (Compose, Resize, RandomCrop, CenterCrop, ToTensor, Normalize, InterpolationMode):
        setattr(transforms, transform.__name__, transform)
    package.transforms = transforms  # type: ignore[attr-defined]
    for module in (package, transforms):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


def log_progress_bars(log: Path) -> None:
    """Make the script's progress bars write one JSON line per update: the bar's name, the time and the increment."""
    import tqdm.auto

    file = log.open("a", buffering=1)

    class LoggingBar(tqdm.auto.tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> Any:
            displayed = super().update(n)
            if self.desc.strip(": ") in ("Steps", "Generating class images") and not self.disable:
                file.write(json.dumps({"bar": self.desc.strip(": "), "time": time.time(), "done": n}) + "\n")
            return displayed

        def __iter__(self) -> Any:
            for item in self.iterable:
                yield item
                self.update()

    tqdm.auto.tqdm = LoggingBar


def main() -> None:
    log, script, *arguments = sys.argv[1:]
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DDPMScheduler,
        DiffusionPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import AutoTokenizer, CLIPTextModel  # noqa: F401

    install_torchvision_replacement()
    log_progress_bars(Path(log))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
