"""Photos of a folder -> RGB pixels ready to crop, and their captions; the only file that opens photos. No torch.

A photo is decoded once: upright, 8-bit RGB, on white where it is transparent, its short side equal to the resolution,
or just covering its bucket. Crops and flips are drawn anew for each use (`cut`). Pillow and numpy are imported where
they are used, because a config resolver imports this file for `fingerprint`.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.data import aspect_buckets, captions, image_formats, masks
from dreambooth.data.image_formats import Unusable
from dreambooth.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Decoded = tuple[NDArray[np.uint8], aspect_buckets.Size | None, NDArray[np.uint8] | None]  # pixels, size, mask

MAX_PIXELS = 178_956_970  # where Pillow refuses a file as a decompression bomb
NO_FINGERPRINT = "0" * 64  # of a folder without photos, or with a file that cannot be read

_NOT_PHOTOS = {"thumbs.db", "desktop.ini", "__macosx", ".txt", ".json", ".jsonl"}  # names and suffixes


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo, ready to crop."""

    path: Path
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB that just covers its size
    caption: str  # see captions.py; else the prompt
    size: aspect_buckets.Size | None = None  # (height, width) that it is cropped to; None: the square of the resolution
    mask: NDArray[np.uint8] | None = None  # (H, W) of the part that counts, see masks.py; None: all of it


def list_photos(folder: Path) -> list[Path]:
    """Every file of `folder` meant as a photo, sorted by the bytes of its name on every system.

    Passes over folders, hidden files, desktops' litter, captions and JSON; any other file counts, so that it is named.

    Raises:
        UserError: the folder does not exist, is a file, cannot be read, or holds no photo.
    """
    advice = "give a folder that holds photos, for example dataset.instance_dir=/path/to/photos"
    if not folder.is_dir():
        raise UserError(f"{folder} {'is a file, not a folder' if folder.exists() else 'does not exist'}: {advice}")
    try:
        entries = sorted(folder.iterdir(), key=lambda path: os.fsencode(path.name))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): {advice}") from error
    photos = [path for path in entries if _is_meant_as_photo(path)]
    if not photos:
        raise UserError(f"{folder} holds no photo (folders inside it are not searched): {advice}")
    return photos


def _is_meant_as_photo(path: Path) -> bool:
    passed_over = path.name.startswith(".") or {path.name.lower(), path.suffix.lower()} & _NOT_PHOTOS
    return not passed_over and not path.is_dir()


def fingerprint(folder: Path) -> str:
    """Hex SHA-256 over name and content of the photos and their captions, wherever the folder lies; never raises.

    A folder without photos or with an unreadable file gives NO_FINGERPRINT."""
    total = hashlib.sha256()
    try:
        for photo in list_photos(folder):
            for path in (photo, *captions.sources(photo)):
                if not path.is_file():  # a broken link, or a pipe that would block
                    return NO_FINGERPRINT
                for part in (os.fsencode(path.name), path.read_bytes()):
                    total.update(hashlib.sha256(part).digest())
    except (UserError, OSError):
        return NO_FINGERPRINT
    return total.hexdigest()


def load_photos(paths: Sequence[Path], prompt: str, resolution: int, bucketed: bool = False,
                mask: str | None = None) -> list[Photo]:
    """Decode each photo once.

    Args:
        bucketed: in the bucket of its shape; False: as a square.
        mask: a folder of masks, "alpha", or None.

    Raises:
        UserError: some files are unusable; names all of them, each with its reason.
    """
    photos: list[Photo] = []
    problems: list[str] = []
    known = {folder: captions.listed(folder, problems) for folder in dict.fromkeys(path.parent for path in paths)}
    for path in paths:
        found = _pixels(path, resolution, bucketed, mask, problems)
        caption = captions.caption(path, prompt, known[path.parent], problems)
        if found is not None and caption is not None:
            pixels, size, inside = found
            photos.append(Photo(path, pixels, caption, size, inside))
    if problems:
        count = f"{len(problems)} file{'s' * (len(problems) > 1)} in {paths[0].parent}"
        raise UserError("\n  ".join([f"{count} cannot be used, replace or remove:", *problems]))
    return photos


def picture(path: Path, resolution: int) -> NDArray[np.uint8]:
    """One picture (H, W, 3) that just covers the square, whatever stands beside it.

    Raises:
        UserError: it is unusable.
    """
    problems: list[str] = []
    found = _pixels(path, resolution, False, None, problems)
    if found is None:
        raise UserError(problems[0])
    return found[0]


def _pixels(path: Path, resolution: int, bucketed: bool, mask: str | None, problems: list[str]) -> Decoded | None:
    """The decoded photo, or None and one more problem."""
    from PIL import Image, UnidentifiedImageError

    try:
        return _decode(path, resolution, bucketed, mask)
    except Unusable as error:
        reason = str(error)
    except PermissionError:
        reason = "cannot be read: check its permissions"
    except UnidentifiedImageError:
        reason = image_formats.what_it_is(path)
    except Image.DecompressionBombError:
        reason = f"is too large: scale it down to less than {MAX_PIXELS // 10**6} megapixels"
    except MemoryError:
        reason = "is too large for the memory of this machine: scale it down"
    except Exception as error:  # Pillow's readers raise almost any type on a broken file
        reason = f"is damaged or truncated ({error}): copy it again, or save it anew as PNG"
    problems.append(f"{path.name} {reason}")
    return None


def _decode(path: Path, resolution: int, bucketed: bool, mask: str | None) -> Decoded:
    import numpy as np
    from PIL import Image

    if not path.is_file():
        raise Unusable("is not a file (a broken link?)")
    if path.stat().st_size == 0:
        raise Unusable("is empty (0 bytes): copy it again")
    if path.suffix.lower() in image_formats.RAW_SUFFIXES:
        raise Unusable("is a camera raw file, which is not supported: export it as JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large but allowed, untidy EXIF: whatever spoils the pixels is raised
        with Image.open(path, formats=image_formats.readable()) as image:
            # Lets the JPEG decoder skip detail while the short side stays at least twice the resolution.
            image.draft(None, (2 * resolution, 2 * resolution))
            image.load()
            _turn_upright(image)
            inside = masks.of(path, image, mask)
            size = aspect_buckets.nearest(image.height, image.width, resolution) if bucketed else None
            pixels = _resize(_flatten(image), size or (resolution, resolution))
        return np.array(pixels), size, None if inside is None else np.array(
                inside.resize(pixels.size, Image.Resampling.BOX))


def _turn_upright(image: Image.Image) -> None:
    from PIL import ImageOps

    with suppress(Exception):  # unreadable EXIF says nothing about orientation
        ImageOps.exif_transpose(image, in_place=True)


def _flatten(image: Image.Image) -> Image.Image:
    """8-bit RGB on white. Before any resize, or the colours hidden under alpha would bleed into the edges."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        image = _to_eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Deep greyscale to L or LA: integers by their high byte, floats by their range. Pillow's convert("L") clips."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values)
        white = next((top for top in (1, 255, 65535) if values.max() <= top), values.max())
        levels = values / white * 255 + 0.5
    else:
        levels = values >> 8
    grey = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _resize(image: Image.Image, size: aspect_buckets.Size) -> Image.Image:
    """Antialiased, so that one side equals that of `size` and the other is no shorter."""
    from PIL import Image

    target, side = min(((size[0], image.height), (size[1], image.width)), key=lambda pair: pair[1] / pair[0])
    height, width = (max(least, round(length * target / side))
                     for least, length in zip(size, (image.height, image.width), strict=True))
    if width * height > MAX_PIXELS:
        raise Unusable(f"is too narrow ({image.width} x {image.height} pixels): crop it closer to a square")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def square(
    pixels: NDArray[np.uint8], resolution: int, where: tuple[float, float] | None, flip: bool
) -> NDArray[np.uint8]:
    """`cut` to (resolution, resolution, 3)."""
    return cut(pixels, (resolution, resolution), where, flip)


def cut(
    pixels: NDArray[np.uint8], size: aspect_buckets.Size, where: tuple[float, float] | None, flip: bool
) -> NDArray[np.uint8]:
    """A copy of that height and width: the centre, or at fractions in [0, 1) of the free rows and columns."""
    down, across = pixels.shape[0] - size[0], pixels.shape[1] - size[1]  # free rows and columns
    top, left = down // 2, across // 2
    if where is not None:
        top, left = int(where[0] * (down + 1)), int(where[1] * (across + 1))
    crop = pixels[top:top + size[0], left:left + size[1]]
    return (crop[:, ::-1] if flip else crop).copy()


def to_model_range(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W, 3) bytes to contiguous (3, H, W) in [-1, 1]."""
    import numpy as np

    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - np.float32(1)
