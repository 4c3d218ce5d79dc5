"""Masks: grey images that define which part of a photo counts in the loss.

White pixels count fully, grey pixels partly, black pixels not at all.

A mask is the photo's alpha channel, or an image from a folder of masks. A mask image has the size and the name of its
photo; the suffix may differ. A mask is resized, cropped and mirrored together with its photo. The loss weight of a
latent is the mean mask value, from 0 (black) to 1 (white), of the pixels that the latent covers. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.config.dataset import ALPHA
from dreambooth.data.image_formats import UnusablePhoto

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # no JPEG: lossy compression alters the edges of a mask


def mask_file(photo: Path, mask: str | None) -> Path | None:
    """Return the path of the mask image of a photo, or None if the photo has no mask image.

    Args:
        mask: a folder of masks, "alpha" for the alpha channel of the photo, or None for no mask.
    """
    if mask is None or mask == ALPHA:
        return None
    candidates = (Path(mask) / f"{photo.stem}{suffix}" for suffix in SUFFIXES)
    return next(filter(Path.is_file, candidates), None)


def load_mask(photo: Path, image: Image.Image, mask: str | None) -> Image.Image | None:
    """Load the mask of a photo as an 8-bit grey image. Return None if `mask` is None.

    Args:
        image: the decoded photo, already turned upright.
        mask: see `mask_file`.

    Raises:
        UnusablePhoto: the photo has no mask, or its mask is all black or has another aspect ratio than the photo.
    """
    from PIL import Image

    if mask is None:
        return None
    if mask == ALPHA:
        if not image.has_transparency_data:
            raise UnusablePhoto("has no transparency: cut the subject out, or type mask=DIR with a folder of masks")
        loaded = image.convert("RGBA").getchannel("A")
    else:
        path = mask_file(photo, mask)
        if path is None:
            raise UnusablePhoto(f"has no mask: put {photo.stem}.png into {mask}, white where the subject is")
        with Image.open(path, formats=("PNG", "WEBP", "BMP", "TIFF", "GIF")) as opened:
            loaded = opened.convert("L")
        aspect_ratio = image.width * loaded.height / (image.height * loaded.width)  # of the photo / of the mask
        if not 0.99 < aspect_ratio < 1.01:
            raise UnusablePhoto(f"has {image.width} x {image.height} pixels, but its mask {path.name} has "
                                f"{loaded.width} x {loaded.height}: save the mask in the photo's size")
    if loaded.getextrema()[1] == 0:
        raise UnusablePhoto("has an empty mask, so nothing of it would be learned: paint the subject white")
    return loaded


def downscale_to_latents(mask: NDArray[np.uint8], scale: int) -> NDArray[np.float32]:
    """Return for each latent the mean mask value of the pixels that it covers; exactly 0 if all these pixels are black.

    Args:
        mask: (H, W), 0 to 255.
        scale: pixels per latent along one side.

    Returns:
        (H / scale, W / scale) in [0, 1].
    """
    import numpy as np

    height, width = mask.shape
    blocks = mask.reshape(height // scale, scale, width // scale, scale)
    shares: NDArray[np.float32] = (blocks.mean((1, 3), dtype=np.float64) / 255).astype(np.float32)
    return shares
