"""Aspect-ratio buckets: image sizes that keep a photo's aspect ratio, with about the area of the square crop.

A size is (height, width) in pixels. The square crop is resolution x resolution. Imports no torch.
"""

import math
from functools import cache

SIDE_MULTIPLE = 8  # pixels; every side is a multiple, because the VAEs encode up to 8 x 8 pixels into one latent
MAX_ASPECT_RATIO = 2  # the long side divided by the short side

Size = tuple[int, int]


@cache
def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """Return all bucket sizes with aspect ratios from 1:2 to 2:1, sorted.

    Sides are multiples of SIDE_MULTIPLE. For each length of one side, the other side is the longest for which the area
    of the bucket is at most the area of the square crop.
    """
    sizes = set()
    for width in range(SIDE_MULTIPLE, MAX_ASPECT_RATIO * resolution + 1, SIDE_MULTIPLE):
        height = resolution**2 // width // SIDE_MULTIPLE * SIDE_MULTIPLE
        if height and max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
            sizes |= {(height, width), (width, height)}
    return tuple(sorted(sizes))


def nearest_bucket(height: int, width: int, resolution: int) -> Size:
    """Return the bucket size for which the smallest fraction of an image of this height and width is cropped away."""
    return min(bucket_sizes(resolution), key=lambda size: (cropped_fraction(height, width, size), size))


def cropped_fraction(height: int, width: int, size: Size) -> float:
    """Return the fraction of an image's area that is cropped away to give the image the aspect ratio of `size`."""
    shape = (width * size[0]) / (height * size[1])
    return 1 - min(shape, 1 / shape)


@cache
def largest_bucket(resolution: int, scale: int, levels: int) -> Size:
    """Return the bucket size whose training step takes the most memory.

    This is the size for which the feature maps of all UNet levels have the most positions in total. If the side of a
    feature map is odd, the side at the next level is half of it, rounded up.

    Args:
        scale: pixels per latent along one side.
        levels: number of UNet levels; the feature maps of each level have half the side length of the level before.
    """
    def positions(size: Size) -> int:
        return sum(math.prod(-(-side // (scale * 2**level)) for side in size) for level in range(levels))

    return max(bucket_sizes(resolution), key=lambda size: (positions(size), size))
