"""Which files can be read as photos, and what the others are. No torch; Pillow is imported where it is used."""

from functools import cache
from pathlib import Path

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Raw files are TIFF containers: Pillow would open the thumbnail inside and call it the photo.
RAW_SUFFIXES = {".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"}
_BRANDS = {b"he": "HEIC", b"mi": "HEIC", b"ms": "HEIC", b"av": "AVIF"}  # of ISO media files: heic, mif1, msf1, avif


class Unusable(Exception):
    """Why a photo cannot be used; completes the sentence "photo.png ..."."""


@cache
def readable() -> tuple[str, ...]:
    """Pillow's names; HEIC is among them with the extra heic.

    An extra and not a dependency: its wheels hold libheif and codecs under LGPL and GPL, which no other part of this
    package has.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def what_it_is(path: Path) -> str:
    """Of a file that is in no readable format; completes the sentence "photo.heic ..."."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] != b"ftyp":
        return f"is not a readable image of a known format ({', '.join(readable())})"
    kind = _BRANDS.get(head[8:10], "a video")
    convert = f"export it as JPEG, for example: magick {path.name} {path.stem}.jpg"
    if kind == "HEIC" and "HEIF" not in readable():
        return f"is HEIC, which needs a package: pip install 'dreambooth[heic]', or {convert}"
    return f"is {kind}, which is {'damaged' if kind == 'HEIC' else 'not supported'}: {convert}"
