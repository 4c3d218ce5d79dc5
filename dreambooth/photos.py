"""Photos of a folder -> square-ready RGB pixels and their captions; the only file that opens photos. No torch.

A photo is decoded once: upright, 8-bit RGB, on white where it is transparent, its short side equal to the resolution.
Crops and flips are drawn anew for each use (`square`). Pillow and numpy are imported where they are used, because a
config resolver imports this file for `fingerprint`.
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

from dreambooth.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 178_956_970  # where Pillow refuses a file as a decompression bomb
NO_FINGERPRINT = "0" * 64  # of a folder without photos, or with a file that cannot be read

_NOT_PHOTOS = {"thumbs.db", "desktop.ini", "__macosx", ".txt", ".json"}  # names and suffixes
# Raw files are TIFF containers: Pillow would open the thumbnail inside and call it the photo.
_RAW_SUFFIXES = {".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"}
_BRANDS = {b"he": "HEIC", b"mi": "HEIC", b"ms": "HEIC", b"av": "AVIF"}  # of ISO media files: heic, mif1, msf1, avif


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo, ready to crop."""

    path: Path
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB, min(H, W) == resolution
    caption: str  # the text of photo.txt beside photo.png, else the prompt


class _Unusable(Exception):
    """Why a photo cannot be used; completes the sentence "photo.png ..."."""


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
            for path in filter(None, (photo, _caption_file(photo))):
                if not path.is_file():  # a broken link, or a pipe that would block
                    return NO_FINGERPRINT
                for part in (os.fsencode(path.name), path.read_bytes()):
                    total.update(hashlib.sha256(part).digest())
    except (UserError, OSError):
        return NO_FINGERPRINT
    return total.hexdigest()


def _caption_file(photo: Path) -> Path | None:
    return next(filter(Path.is_file, map(photo.with_suffix, (".txt", ".TXT"))), None)


def load_photos(paths: Sequence[Path], prompt: str, resolution: int) -> list[Photo]:
    """Decode each photo once.

    Raises:
        UserError: some files are unusable; names all of them, each with its reason.
    """
    photos: list[Photo] = []
    problems: list[str] = []
    for path in paths:
        pixels, caption = _pixels(path, resolution, problems), _caption(path, prompt, problems)
        if pixels is not None and caption is not None:
            photos.append(Photo(path, pixels, caption))
    if problems:
        count = f"{len(problems)} file{'s' * (len(problems) > 1)} in {paths[0].parent}"
        raise UserError("\n  ".join([f"{count} cannot be used, replace or remove:", *problems]))
    return photos


def _pixels(path: Path, resolution: int, problems: list[str]) -> NDArray[np.uint8] | None:
    """The decoded photo, or None and one more problem."""
    from PIL import Image, UnidentifiedImageError

    try:
        return _decode(path, resolution)
    except _Unusable as error:
        reason = str(error)
    except PermissionError:
        reason = "cannot be read: check its permissions"
    except UnidentifiedImageError:
        reason = _what_it_is(path)
    except Image.DecompressionBombError:
        reason = f"is too large: scale it down to less than {MAX_PIXELS // 10**6} megapixels"
    except MemoryError:
        reason = "is too large for the memory of this machine: scale it down"
    except Exception as error:  # Pillow's readers raise almost any type on a broken file
        reason = f"is damaged or truncated ({error}): copy it again, or save it anew as PNG"
    problems.append(f"{path.name} {reason}")
    return None


def _decode(path: Path, resolution: int) -> NDArray[np.uint8]:
    import numpy as np
    from PIL import Image

    if not path.is_file():
        raise _Unusable("is not a file (a broken link?)")
    if path.stat().st_size == 0:
        raise _Unusable("is empty (0 bytes): copy it again")
    if path.suffix.lower() in _RAW_SUFFIXES:
        raise _Unusable("is a camera raw file, which is not supported: export it as JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large but allowed, untidy EXIF: whatever spoils the pixels is raised
        with Image.open(path, formats=FORMATS) as image:
            # Lets the JPEG decoder skip detail while the short side stays at least twice the resolution.
            image.draft(None, (2 * resolution, 2 * resolution))
            image.load()
            _turn_upright(image)
            return np.array(_resize(_flatten(image), resolution))


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


def _resize(image: Image.Image, resolution: int) -> Image.Image:
    """Antialiased, so that the short side equals the resolution."""
    from PIL import Image

    short = min(image.size)
    width, height = (max(resolution, round(side * resolution / short)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise _Unusable(f"is too narrow ({image.width} x {image.height} pixels): crop it closer to a square")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _what_it_is(path: Path) -> str:  # for a file in none of FORMATS
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] != b"ftyp":
        return f"is not a readable image of a known format ({', '.join(FORMATS)})"
    kind = _BRANDS.get(head[8:10], "a video")
    return f"is {kind}, which is not supported: export it as JPEG, for example: magick {path.name} {path.stem}.jpg"


def _caption(photo: Path, prompt: str, problems: list[str]) -> str | None:
    """The caption of a photo on one line, or None and one more problem."""
    path = _caption_file(photo)
    if path is None:
        return prompt
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
        return None
    except UnicodeDecodeError:
        problems.append(f"{path.name} is not UTF-8 text: save the caption as UTF-8")
        return None
    if not text:
        problems.append(f"{path.name} is empty: write the caption into it, or remove it to use the prompt")
    return text or None


def square(
    pixels: NDArray[np.uint8], resolution: int, where: tuple[float, float] | None, flip: bool
) -> NDArray[np.uint8]:
    """A (resolution, resolution, 3) copy: the centre, or at fractions in [0, 1) of the free rows and columns."""
    down, across = pixels.shape[0] - resolution, pixels.shape[1] - resolution  # free rows and columns
    top, left = down // 2, across // 2
    if where is not None:
        top, left = int(where[0] * (down + 1)), int(where[1] * (across + 1))
    crop = pixels[top:top + resolution, left:left + resolution]
    return (crop[:, ::-1] if flip else crop).copy()


def to_model_range(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W, 3) bytes to contiguous (3, H, W) in [-1, 1]."""
    import numpy as np

    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - np.float32(1)
