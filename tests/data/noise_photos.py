"""Photos of noise, and the recipe of a run with two subjects."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.config.compose import load
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.data.photo_set import PhotoSet
from dreambooth.data.photos import Photo, list_photos, load_photos
from dreambooth.errors import UserError
from tests.support.configs import compose_config

PROMPT = "a photo of a zwx dog"
TWO = ("dataset=concepts", "dataset.concepts.0.instance_dir=A",
       "dataset.concepts.0.instance_prompt=a photo of a zwx dog", "dataset.concepts.0.class_prompt=a photo of a dog",
       "dataset.concepts.1.instance_dir=B",
       "dataset.concepts.1.instance_prompt=a photo of a ohwx dog", "dataset.concepts.1.class_prompt=a photo of a dog",
       "dataset.allow_drawings=true")


def recipe(*overrides: str) -> Recipe:
    return resolve(load(compose_config(*overrides)), Path("runs/x"))


def save_noise(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def loading_error(folder: Path, **more: object) -> str:
    with pytest.raises(UserError) as raised:
        load_photos(list_photos(folder), PROMPT, 16, **more)  # type: ignore[arg-type]
    return str(raised.value)


# -- captions and HEIC --------------------------------------------------------------------------------------------

def write_metadata(folder: Path, *lines: object) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))


SHAPES = [(8, 8), (8, 8), (8, 8), (16, 4), (16, 4), (4, 16)]


def bucketed_set(name: str = "instance", shapes: list[tuple[int, int]] = SHAPES, **more: object) -> PhotoSet:
    """Photos of several sizes; the last digit of a caption is the photo's number."""
    generator = np.random.default_rng(1)
    photos = [Photo(Path(f"{i}.png"), generator.integers(0, 256, (h, w, 3), dtype=np.uint8), f"caption {i}", (h, w))
              for i, (h, w) in enumerate(shapes)]
    return PhotoSet(name, photos, True, False, **more)  # type: ignore[arg-type]
