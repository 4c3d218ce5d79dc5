"""Colour profiles: converts photos to sRGB, the colour space of the photos that base models were trained on.

The numbers of a pixel mean a colour only together with the colour profile of the file. Telephones write Display P3,
cameras Adobe RGB, and files for print the CMYK of a printer. A photo without a profile counts as sRGB.

Imports no torch. Pillow and numpy are imported inside functions, because a config resolver imports this file.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING

from dreambooth.data import image_formats

if TYPE_CHECKING:
    from PIL import Image, ImageCms

CONVERSION = b"colour profile to sRGB"  # counts in the fingerprint of a photo that is converted
TOLERANCE = 2  # of 255: a profile that changes no colour by more describes sRGB, with rounded numbers
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> Pillow's mode of its pixels
_MARKS = (b"acsp", b"iCCP")  # signature of every profile, and the name of PNG's chunk, whose content is compressed


class UnusableProfile(Exception):
    """Raised for a profile that cannot be applied. The message completes "has a colour profile that"."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image to RGB or RGBA in sRGB. Return it unchanged if it has no profile, or the profile of sRGB.

    Transparency is kept. Grey images may have a profile of grey levels or of RGB.

    Args:
        image: an image with at most 8 bits per channel.
        profile: the embedded profile of the image, in ICC format.

    Raises:
        UnusableProfile: the profile is damaged, or it belongs to pixels of another kind.
    """
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image
    if not image.has_transparency_data:
        return transform.apply(image.convert(transform.input_mode))
    rgba = image.convert("RGBA")
    converted = transform.apply(rgba.convert(transform.input_mode))
    converted.putalpha(rgba.getchannel("A"))
    return converted


def has_mark(content: bytes) -> bool:
    """Return whether a file may contain a colour profile, so that `is_converted` depends on the decoders."""
    return any(mark in content for mark in _MARKS)


def is_converted(content: bytes) -> bool | None:
    """Return whether a photo has a profile by which `to_srgb` changes its pixels. Never raises.

    Return None if the file cannot be opened, such as a HEIC file without the extra `heic`.

    Args:
        content: the bytes of the photo's file.
    """
    if not has_mark(content):
        return False
    from PIL import Image

    try:
        with Image.open(BytesIO(content), formats=image_formats.readable_formats()) as image:
            profile = image.info.get("icc_profile")
            return bool(profile) and _transform(profile, image.mode) is not None
    except UnusableProfile:
        return False
    except Exception:  # Pillow raises almost any exception type
        return None


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB, or None if the profile describes sRGB.

    Args:
        mode: Pillow's mode of the image that has the profile.

    Raises:
        UnusableProfile: as in `to_srgb`.
    """
    from PIL import ImageCms

    kinds = ["CMYK"] if mode == "CMYK" else ["L", "RGB"] if mode[0] in "1LIF" and mode != "LAB" else ["RGB"]
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        needed = _MODES.get(space, space)
        if needed not in kinds:
            raise UnusableProfile(f"is of {space}, while its pixels are not")
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(opened, srgb, needed, "RGB", ImageCms.Intent.PERCEPTUAL)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise UnusableProfile("is damaged") from error
    return None if needed != "CMYK" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    import numpy as np
    from PIL import Image

    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    if transform.input_mode == "L":
        colors = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    image = Image.fromarray(colors).convert(transform.input_mode)
    difference = np.asarray(transform.apply(image)).astype(int) - np.asarray(image.convert("RGB"))
    return bool(np.abs(difference).max() <= TOLERANCE)
