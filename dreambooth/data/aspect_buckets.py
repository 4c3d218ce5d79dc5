"""Aspect-ratio buckets: the image sizes that keep a photo's shape at about the area of the square. No torch.

A size is (height, width) in pixels.
"""

import math
from functools import cache

SIDE_MULTIPLE = 8  # pixels, of which every side is a multiple; a VAE here makes one latent of at most 8 x 8 pixels
MAX_ASPECT_RATIO = 2  # long side to short side

Size = tuple[int, int]


@cache
def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """Return all bucket sizes from 1:2 to 2:1, sorted.

    Sides are multiples of SIDE_MULTIPLE. Each width has the largest height that stays within the area of the square.
    """
    sizes = set()
    for width in range(SIDE_MULTIPLE, MAX_ASPECT_RATIO * resolution + 1, SIDE_MULTIPLE):
        height = resolution**2 // width // SIDE_MULTIPLE * SIDE_MULTIPLE
        if height and max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
            sizes |= {(height, width), (width, height)}
    return tuple(sorted(sizes))


def nearest_bucket(height: int, width: int, resolution: int) -> Size:
    """Return the bucket size that crops the smallest fraction of an image."""
    return min(bucket_sizes(resolution), key=lambda size: (cropped_fraction(height, width, size), size))


def cropped_fraction(height: int, width: int, size: Size) -> float:
    """Return the fraction of an image's area that is cropped to give it the shape of `size`."""
    shape = (width * size[0]) / (height * size[1])
    return 1 - min(shape, 1 / shape)


@cache
def largest_bucket(resolution: int, scale: int, levels: int) -> Size:
    """Return the bucket size whose training step takes the most memory.

    It is the one with the most positions over all levels of the UNet. Each level rounds odd sides up.

    Args:
        scale: pixels per latent along one side.
        levels: number of UNet levels; each has half the side length of the level before.
    """
    def positions(size: Size) -> int:
        return sum(math.prod(-(-side // (scale * 2**level)) for side in size) for level in range(levels))

    return max(bucket_sizes(resolution), key=lambda size: (positions(size), size))
