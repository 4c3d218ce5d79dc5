"""Image formats: the formats that can be read as photos, and advice for files in other formats. Imports no torch.

Pillow is imported inside functions, because a config resolver imports this file.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
WITH_FRAMES = ("PNG", "WEBP", "GIF", "TIFF", "HEIF")  # formats of animations, of pages and of bursts
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif"}  # lower case

# Raw files are TIFF containers: Pillow would open the thumbnail inside as if it were the photo.
RAW_SUFFIXES = {".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"}
_BRANDS = {b"he": "HEIC", b"mi": "HEIC", b"ms": "HEIC", b"av": "AVIF"}  # start of an ISO brand: heic, mif1, msf1, avif


_without_warnings = ExitStack()  # entered while at least one thread decodes a photo
_decoding_threads = 0
_lock = threading.Lock()


class UnusablePhoto(Exception):
    """Raised for a photo that cannot be used. The message completes a sentence that starts with the file name."""


@contextmanager
def without_warnings() -> Iterator[None]:
    """Context manager in which no warnings are shown. Several threads may use it at the same time.

    The filters of warnings belong to the whole process. With `warnings.catch_warnings` in each of several threads, the
    last thread could restore filters that another thread had set.
    """
    global _decoding_threads
    with _lock:
        if not _decoding_threads:
            _without_warnings.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _decoding_threads += 1
    try:
        yield
    finally:
        with _lock:
            _decoding_threads -= 1
            if not _decoding_threads:
                _without_warnings.close()


@cache
def readable_formats() -> tuple[str, ...]:
    """Return Pillow's names of the readable formats, including HEIF if the extra `heic` is installed.

    `heic` is an optional extra, because its wheels contain libheif and codecs under LGPL and GPL. No other part of this
    package has these licences.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def describe_unreadable(path: Path) -> str:
    """Return why a file cannot be read and what to do, as the end of a sentence that starts with the file name."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] != b"ftyp":
        return f"is not a readable image of a known format ({', '.join(readable_formats())})"
    kind = _BRANDS.get(head[8:10], "a video")
    convert = f"export it as JPEG, for example: magick {path.name} {path.stem}.jpg"
    if kind == "HEIC" and "HEIF" not in readable_formats():
        return f"is HEIC, which needs a package: pip install 'dreambooth[heic]', or {convert}"
    return f"is {kind}, which is {'damaged' if kind == 'HEIC' else 'not supported'}: {convert}"
