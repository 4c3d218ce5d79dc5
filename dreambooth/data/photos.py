"""Loads a folder of photos as RGB pixels with captions. No other file decodes photos. Imports no torch.

A photo is decoded, turned upright, and converted to 8-bit sRGB; transparent parts become white. The photo is then
resized so that its short side equals the resolution, or so that it just covers its aspect-ratio bucket. Crops and flips
are applied each time a sample uses the photo (`crop_to_size`). Pillow and numpy are imported inside functions, because
a config resolver imports this file to list photos.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.data import aspect_buckets, captions, color_profiles, image_formats, masks
from dreambooth.data.image_formats import UnusablePhoto
from dreambooth.data.index.ordered_map import ordered_map
from dreambooth.errors import UserError
from dreambooth.utils import quoting
from dreambooth.utils.plurals import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from dreambooth.data.index.pixel_store import StoredPixels

    PixelArray = NDArray[np.uint8] | StoredPixels
    # pixels, bucket, mask, original size, remarks
    Decoded = tuple[NDArray[np.uint8], aspect_buckets.Size | None, NDArray[np.uint8] | None, aspect_buckets.Size,
                    tuple[str, ...]]

MIN_BRIGHTEST = 64  # of 255: a photo of 16 bits per channel without a brighter pixel has fewer bits, such as 12 or 14
MAX_PIXELS = 178_956_970  # Pillow refuses a larger image as a decompression bomb
LARGE_PIXELS = 25_000_000  # larger images are decoded one at a time: a PNG of 100 megapixels takes up to 1.2 GiB
_one_large_photo = threading.Lock()

IGNORED_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}  # files and folders of file managers, in lower case
_NOT_PHOTOS = {*IGNORED_NAMES, *captions.TEXT_SUFFIXES, *captions.METADATA, ".json", ".jsonl"}  # in lower case
_MAX_SUBFOLDERS = 1000  # subfolders that are looked into for a message
PREPARED = ("masks", "review")  # subfolders that the command prepare writes beside the photos


@dataclass(frozen=True)
class Facts:
    """What checks and caches need to know about the pixels of a photo, so that they need not read them again."""

    digest: str  # hex SHA-256 of the pixels
    contrast: bool  # whether something can be seen, see photo_checks.py
    detail: float | None  # see photo_checks.py; None without contrast
    hash: int | None  # perceptual hash of 64 bits; None without contrast, or without the package
    mask_in_centre: bool  # whether the mask, if there is one, is not empty in the central crop


@dataclass(frozen=True, eq=False)
class Photo:
    """One decoded and resized photo, not yet cropped."""

    path: Path
    pixels: PixelArray  # (H, W, 3) RGB that just covers `size`
    caption: str  # see captions.py; the prompt, if the photo has no caption
    size: aspect_buckets.Size | None = None  # (height, width) of the crop; None: a square, resolution x resolution
    mask: PixelArray | None = None  # (H, W), see masks.py; None: the whole photo counts in the loss
    original: aspect_buckets.Size | None = None  # (height, width) of the upright file; None: the size of `pixels`
    remarks: tuple[str, ...] = ()  # what is lost of the file; each completes a sentence that starts with its name
    facts: Facts | None = None  # see photo_checks.measure; None: not measured yet

    @property
    def original_size(self) -> aspect_buckets.Size:
        """The (height, width) in pixels before the photo was resized."""
        return self.original or (self.pixels.shape[0], self.pixels.shape[1])

    @cached_property
    def digest(self) -> str:
        """A hex SHA-256 of the pixels."""
        return self.facts.digest if self.facts else sha256(self.pixels.tobytes()).hexdigest()


# Takes paths, resolution, `bucketed` and `mask` of `load_photos`; yields for each path the photo without its caption,
# or None and why it cannot be used.
Load = Callable[[Sequence[Path], int, bool, str | None], Iterable[tuple[Photo | None, list[str]]]]


def list_photos(folder: Path, key: str = "dataset.instance_dir") -> list[Path]:
    """Return the photo files of a folder, sorted by the bytes of their names: the same order on every system.

    Subfolders, hidden files, captions, JSON files, and files that file managers create (such as Thumbs.db) are ignored.
    Every other file counts as a photo, so that `load_photos` reports unusable files.

    Args:
        key: the key of the configuration whose value is the folder, for the message of the error.

    Raises:
        UserError: the folder does not exist, is a file, cannot be read, or holds no photo.
    """
    advice = f"give a folder that holds photos, for example {key}=/path/to/photos"
    if not folder.is_dir():
        raise UserError(f"{folder} {'is a file, not a folder' if folder.exists() else 'does not exist'}: {advice}")
    try:
        entries = sorted(folder.iterdir(), key=lambda path: os.fsencode(path.name))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): {advice}") from error
    photos = [path for path in entries if _is_photo_candidate(path)]
    if not photos:
        raise UserError(f"{folder} holds no photo{_describe_subfolders(folder, key) or f': {advice}'}")
    return photos


def photos_in_subfolders(folder: Path) -> dict[Path, int]:
    """Return the number of photos in each subfolder of a folder, at any depth. Subfolders without photos are left out.

    Only files with the suffix of an image format count. Hidden folders are not searched, nor those that the command
    prepare has written. Never raises.
    """
    counts: dict[Path, int] = {}
    skipped = {folder / name for name in PREPARED if (folder / "review" / "report.json").is_file()}
    for number, (inside, subfolders, files) in enumerate(os.walk(folder)):
        subfolders[:] = sorted(name for name in subfolders
                               if not name.startswith(".") and name.lower() not in IGNORED_NAMES
                               and Path(inside, name) not in skipped)
        images = [name for name in files if not name.startswith(".")
                  and Path(name).suffix.lower() in image_formats.SUFFIXES]
        if images and number:
            counts[Path(inside)] = len(images)
        if number == _MAX_SUBFOLDERS:
            break
    return counts


def _describe_subfolders(folder: Path, key: str) -> str:
    """Return the end of the message about a folder without photos, if its subfolders have photos; else ""."""
    counts = photos_in_subfolders(folder)
    listed = ", ".join(f"{path.relative_to(folder)} ({count})" for path, count in list(counts.items())[:5])
    if not counts:
        return ""
    typed = quoting.override(key, str(next(iter(counts))))
    if len(counts) > 1 and key == "dataset.instance_dir":
        typed += (" for one of them, or dataset=concepts "
                  + " ".join(quoting.override(f"dataset.concepts.{number}.instance_dir", str(path))
                             for number, path in enumerate(list(counts)[:2])) + " for several subjects")
    return f" itself, but its subfolders do: {listed}{', ...' * (len(counts) > 5)}: type {typed}"


def _is_photo_candidate(path: Path) -> bool:
    ignored = path.name.startswith(".") or {path.name.lower(), path.suffix.lower()} & _NOT_PHOTOS
    return not ignored and not path.is_dir()


def load_photos(paths: Sequence[Path], prompt: str, resolution: int, bucketed: bool = False,
                mask: str | None = None, load: Load | None = None) -> list[Photo]:
    """Load photos: decode the images in threads, and read their captions and masks.

    Args:
        prompt: the caption of a photo that has no caption of its own.
        resolution: side of the square crop in pixels.
        bucketed: True: resize each photo to cover its aspect-ratio bucket; False: to cover the square crop.
        mask: a folder of masks, "alpha", or None, see masks.py.
        load: how images are loaded, such as index/photo_loader.py; None: `decode_photos`, with all pixels in memory.

    Raises:
        UserError: a file is unusable. The message names every unusable file and the reason.
    """
    photos: list[Photo] = []
    problems: list[str] = []
    folders = dict.fromkeys(path.parent for path in paths)
    metadata = {folder: captions.read_metadata(folder, problems) for folder in folders}
    for path, (photo, reasons) in zip(
            paths, (load or decode_photos)(paths, resolution, bucketed, mask), strict=True):
        problems += reasons
        caption = captions.read_caption(path, prompt, metadata[path.parent], problems)
        if photo is not None and caption is not None:
            photos.append(replace(photo, caption=caption))
    if problems:
        count = f"{counted(len(problems), 'file')} in {paths[0].parent}"
        raise UserError("\n  ".join([f"{count} cannot be used, replace or remove:", *problems]))
    return photos


def decode_photos(paths: Sequence[Path], resolution: int, bucketed: bool = False,
                  mask: str | None = None) -> Iterator[tuple[Photo | None, list[str]]]:
    """Decode photos in threads and keep all pixels in memory, see `Load`."""
    def decode(path: Path) -> tuple[Photo | None, list[str]]:
        problems: list[str] = []
        return load_photo(path, resolution, problems, bucketed, mask), problems

    return ordered_map(decode, paths, 1 if len(paths) == 1 else None)


def load_photo(path: Path, resolution: int, problems: list[str], bucketed: bool = False,
               mask: str | None = None) -> Photo | None:
    """Decode one photo; its caption is "". If it is unusable, append the reason to `problems` and return None.

    Arguments are as in `load_photos`.
    """
    decoded = _try_decode(path, resolution, bucketed, mask, problems)
    if decoded is None:
        return None
    pixels, size, mask_pixels, original, remarks = decoded
    return Photo(path, pixels, "", size, mask_pixels, original, remarks)


def load_image(path: Path, resolution: int) -> NDArray[np.uint8]:
    """Decode one image as (H, W, 3), resized to just cover the square crop. Captions and masks are ignored.

    Raises:
        UserError: the image is unusable.
    """
    problems: list[str] = []
    decoded = _try_decode(path, resolution, False, None, problems)
    if decoded is None:
        raise UserError(problems[0])
    return decoded[0]


def _try_decode(path: Path, resolution: int, bucketed: bool, mask: str | None, problems: list[str]) -> Decoded | None:
    """Decode a photo. If the photo is unusable, append the reason to `problems` and return None."""
    from PIL import Image, UnidentifiedImageError

    try:
        return _decode(path, resolution, bucketed, mask)
    except UnusablePhoto as error:
        reason = str(error)
    except PermissionError:
        reason = "cannot be read: check its permissions"
    except UnidentifiedImageError:
        reason = image_formats.describe_unreadable(path)
    except Image.DecompressionBombError:
        reason = f"is too large: scale it down to less than {MAX_PIXELS // 10**6} megapixels"
    except MemoryError:
        reason = "is too large for the memory of this machine: scale it down"
    except Exception as error:  # Pillow's decoders raise almost any exception type on a broken file
        reason = f"is damaged or truncated ({error}): copy it again, or save it again as PNG"
    problems.append(f"{path.name} {reason}")
    return None


def _decode(path: Path, resolution: int, bucketed: bool, mask: str | None) -> Decoded:
    import numpy as np
    from PIL import Image

    if not path.is_file():
        raise UnusablePhoto("is not a file (a broken link?)")
    if path.stat().st_size == 0:
        raise UnusablePhoto("is empty (0 bytes): copy it again")
    if path.suffix.lower() in image_formats.RAW_SUFFIXES:
        raise UnusablePhoto("is a camera raw file, which is not supported: export it as JPEG")
    image_formats.ignore_warnings()  # large files and malformed EXIF only warn; damaged pixels raise
    with Image.open(path, formats=image_formats.readable_formats()) as image:
        original = image.height, image.width
        # The JPEG decoder may downscale, as long as the short side stays at least twice the resolution.
        image.draft(None, (2 * resolution, 2 * resolution))
        height, width = original if image.info.get("progressive") else image.size  # as it is held in memory
        with _one_large_photo if height * width > LARGE_PIXELS else nullcontext():
            image.load()
            decoded_size = image.size
            _turn_upright(image)
            if image.size != decoded_size:  # turned by 90 degrees
                original = original[::-1]
            mask_image = masks.load_mask(path, image, mask)
            size = aspect_buckets.nearest_bucket(image.height, image.width, resolution) if bucketed else None
            remarks: list[str] = []
            pixels = _resize(_flatten(image, remarks), size or (resolution, resolution))
            remarks += _describe_frames(image)
    mask_pixels = None if mask_image is None else np.array(mask_image.resize(pixels.size, Image.Resampling.BOX))
    return np.array(pixels), size, mask_pixels, original, tuple(remarks)


def _turn_upright(image: Image.Image) -> None:
    from PIL import ImageOps

    with suppress(Exception):  # unreadable EXIF data has no orientation to apply
        ImageOps.exif_transpose(image, in_place=True)


def _describe_frames(image: Image.Image) -> Iterator[str]:
    """Yield a remark if an image has several frames or pages. Call this function last: it may seek other frames.

    The other pictures of a JPEG (format MPO) are previews and depth maps. They are not mentioned.
    """
    frames = 1
    with suppress(Exception):  # a damaged frame that is not used
        frames = getattr(image, "n_frames", 1) if image.format in image_formats.WITH_FRAMES else 1
    if frames > 1:
        yield f"has {frames} frames, and only the first is used: save the others that you need as files of their own"


def _flatten(image: Image.Image, remarks: list[str]) -> Image.Image:
    """Convert an image to 8-bit RGB in sRGB and replace transparency by white.

    Call this function before any resize: otherwise the colours of transparent pixels would bleed into visible edges.

    Args:
        remarks: receives what is lost, see `Photo.remarks`.
    """
    from PIL import Image

    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bit(image, remarks)
    try:
        image = color_profiles.to_srgb(image, profile)
    except color_profiles.UnusableProfile as error:
        remarks.append(f"has a colour profile that {error}, so that its colours count as sRGB: export it as sRGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _to_eight_bit(image: Image.Image, remarks: list[str]) -> Image.Image:
    """Convert 16-bit, 32-bit or float greyscale to mode L or LA. Pillow's convert("L") would clip the values.

    Integers are divided by 256, rounded down and limited to 255. Floats are scaled so that the white level becomes 255.
    The white level is 1 if no value exceeds 1, otherwise 255 if no value exceeds 255, otherwise 65535 if no value
    exceeds 65535. If a value exceeds 65535, the white level is the greatest value.

    Add a remark if the integers use so little of 0 to 65535, or so much more, that the result is dark or white.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values)
        white = next((top for top in (1, 255, 65535) if values.max() <= top), values.max())
        levels = values / white * 255 + 0.5
    else:
        levels = values >> 8
        if not MIN_BRIGHTEST <= levels.max() <= 255:
            becomes = "dark" if levels.max() < MIN_BRIGHTEST else "white where it exceeds 65535"
            remarks.append(f"has values up to {values.max()}, while white is 65535, and becomes {becomes}: save it "
                           "with 8 bits per channel")
    grey = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _resize(image: Image.Image, size: aspect_buckets.Size) -> Image.Image:
    """Resize an image with antialiasing so that it just covers `size`: one side is equal, the other equal or longer."""
    from PIL import Image

    target, side = min(((size[0], image.height), (size[1], image.width)), key=lambda pair: pair[1] / pair[0])
    height, width = (max(least, round(length * target / side))
                     for least, length in zip(size, (image.height, image.width), strict=True))
    if width * height > MAX_PIXELS:
        raise UnusablePhoto(f"is too narrow ({image.width} x {image.height} pixels): crop it closer to a square")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def crop_to_square(
    pixels: PixelArray, resolution: int, offset: tuple[float, float] | None, flip: bool
) -> NDArray[np.uint8]:
    """Return a square crop of the pixels, of shape (resolution, resolution, 3). Arguments are as in `crop_to_size`."""
    return crop_to_size(pixels, (resolution, resolution), offset, flip)


def crop_to_size(
    pixels: PixelArray, size: aspect_buckets.Size, offset: tuple[float, float] | None, flip: bool
) -> NDArray[np.uint8]:
    """Return a copy of the pixels, cropped to `size` and optionally mirrored.

    Args:
        offset: (vertical, horizontal) position of the crop, as fractions in [0, 1) of the rows and columns outside the
            crop; None: the centre.
        flip: mirror the crop left to right.
    """
    top, left = crop_position(pixels, size, offset)
    crop = pixels[top:top + size[0], left:left + size[1]]
    return (crop[:, ::-1] if flip else crop).copy()


def crop_position(
    pixels: PixelArray, size: aspect_buckets.Size, offset: tuple[float, float] | None
) -> tuple[int, int]:
    """Return the row and the column of the pixels at which a crop starts, see `crop_to_size`."""
    rows, columns = pixels.shape[0] - size[0], pixels.shape[1] - size[1]  # left out by the crop
    if offset is None:
        return rows // 2, columns // 2
    return int(offset[0] * (rows + 1)), int(offset[1] * (columns + 1))


def to_model_range(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert 8-bit pixels (H, W, 3) to a contiguous float32 array (3, H, W) in [-1, 1]."""
    import numpy as np

    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - np.float32(1)
