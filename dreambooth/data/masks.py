"""Masks: the part of a photo whose loss counts. White is inside, black outside, grey in between. No torch.

A mask is the photo's own transparency, or a picture of its size and name (but for the suffix) in a folder of masks.
It is resized, cropped and mirrored with its photo; a latent counts by the share of its pixels that lie inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.config.dataset import ALPHA
from dreambooth.data.image_formats import Unusable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # a JPEG's edges are not exact


def file_of(photo: Path, mask: str | None) -> Path | None:
    """The mask's own file, if there is one.

    Args:
        mask: a folder, "alpha", or None for no mask.
    """
    if mask is None or mask == ALPHA:
        return None
    named = (Path(mask) / f"{photo.stem}{suffix}" for suffix in SUFFIXES)
    return next(filter(Path.is_file, named), None)


def of(photo: Path, image: Image.Image, mask: str | None) -> Image.Image | None:
    """The mask of an upright photo in the photo's size, 8-bit grey.

    Raises:
        Unusable: there is none, or it is empty or of another shape.
    """
    from PIL import Image

    if mask is None:
        return None
    if mask == ALPHA:
        if not image.has_transparency_data:
            raise Unusable("has no transparency: cut the subject out, or type mask=DIR with a folder of masks")
        found = image.convert("RGBA").getchannel("A")
    else:
        path = file_of(photo, mask)
        if path is None:
            raise Unusable(f"has no mask: put {photo.stem}.png into {mask}, white where the subject is")
        with Image.open(path, formats=("PNG", "WEBP", "BMP", "TIFF", "GIF")) as opened:
            found = opened.convert("L")
        shape = image.width * found.height / (image.height * found.width)
        if not 0.99 < shape < 1.01:
            raise Unusable(f"has {image.width} x {image.height} pixels and its mask {path.name} {found.width} x "
                           f"{found.height}: save the mask in the photo's size")
    if found.getextrema()[1] == 0:
        raise Unusable("has an empty mask: nothing of it would be learned; paint the subject white")
    return found


def at_latents(mask: NDArray[np.uint8], scale: int) -> NDArray[np.float32]:
    """Pixels (H, W) to the share of each latent that lies inside, (H / scale, W / scale); 0 exactly where none does."""
    import numpy as np

    height, width = mask.shape
    blocks = mask.reshape(height // scale, scale, width // scale, scale)
    shares: NDArray[np.float32] = (blocks.mean((1, 3), dtype=np.float64) / 255).astype(np.float32)
    return shares
