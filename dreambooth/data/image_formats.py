"""Image formats: the formats that can be read as photos, and advice for files in other formats. Imports no torch.

Pillow is imported inside functions, because a config resolver imports this file.
"""

import re
import warnings
from functools import cache
from pathlib import Path

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
CODECS = ("jpg", "libjpeg_turbo", "webp", "libtiff", "littlecms2")  # Pillow's names of libraries that decode to pixels
WITH_FRAMES = ("PNG", "WEBP", "GIF", "TIFF", "HEIF")  # formats of animations, of pages and of bursts
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif"}  # lower case

# Raw files are TIFF containers: Pillow would open the thumbnail inside as if it were the photo.
RAW_SUFFIXES = {".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"}
_BRANDS = {b"he": "HEIC", b"mi": "HEIC", b"ms": "HEIC", b"av": "AVIF"}  # start of an ISO brand: heic, mif1, msf1, avif

# A filter of the module `warnings`, as it is stored there: action, message, category, module, line.
_IGNORE_DECODERS = ("ignore", None, Warning, re.compile(r"(PIL|pillow_heif)\b"), 0)


class UnusablePhoto(Exception):
    """Raised for a photo that cannot be used. The message completes a sentence that starts with the file name."""


def ignore_warnings() -> None:
    """Make the process ignore the warnings of the decoders, from now on. Call this function before an image is decoded.

    `warnings.catch_warnings` is not used, because the filters belong to the whole process: if one thread leaves such a
    block while another is in its own, filters that should have ended stay for ever.
    """
    if _IGNORE_DECODERS not in warnings.filters:
        warnings.filterwarnings("ignore", module=_IGNORE_DECODERS[3].pattern)


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


@cache
def decoder_versions() -> str:
    """Return the versions of everything that determines the pixels of a decoded photo, apart from this package."""
    import PIL
    from PIL import features

    versions = [f"Pillow {PIL.__version__}", *(f"{name} {features.version(name)}" for name in CODECS)]
    if "HEIF" in readable_formats():
        import pillow_heif

        versions.append(f"pillow_heif {pillow_heif.__version__} {pillow_heif.libheif_version()}")
    return ", ".join(versions)


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
