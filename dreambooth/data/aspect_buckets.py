"""Aspect-ratio buckets: photos keep their shape, in a few sizes of about the area of the square. No torch.

Sizes are (height, width).
"""

import math
from functools import cache

STEP = 8  # pixels; a latent of Stable Diffusion
WIDEST = 2  # long side to short side

Size = tuple[int, int]


@cache
def sizes(resolution: int) -> tuple[Size, ...]:
    """All sizes in multiples of STEP from 1:2 to 2:1; for each width the largest height within the square's area."""
    found = set()
    for width in range(STEP, WIDEST * resolution + 1, STEP):
        height = resolution**2 // width // STEP * STEP
        if height and max(width, height) <= WIDEST * min(width, height):
            found |= {(height, width), (width, height)}
    return tuple(sorted(found))


def nearest(height: int, width: int, resolution: int) -> Size:
    """The size that crops least of a picture."""
    return min(sizes(resolution), key=lambda size: (lost(height, width, size), size))


def lost(height: int, width: int, size: Size) -> float:
    """The share of a picture that is cropped to have the shape of `size`."""
    shape = (width * size[0]) / (height * size[1])
    return 1 - min(shape, 1 / shape)


@cache
def largest(resolution: int, scale: int, levels: int) -> Size:
    """The size that takes most memory in a step: most positions over a UNet's levels, whose odd sides are rounded up.

    Args:
        scale: pixels of a side per latent.
        levels: of the UNet, each half the size of the one before.
    """
    def positions(size: Size) -> int:
        return sum(math.prod(-(-side // (scale * 2**level)) for side in size) for level in range(levels))

    return max(sizes(resolution), key=lambda size: (positions(size), size))
