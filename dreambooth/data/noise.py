"""The noise of a training sample: white, with offset noise and multi-resolution noise added."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dreambooth.utils import rng

LEVELS = 6  # resolutions of multi-resolution noise below that of the latents


def draw_noise(shape: tuple[int, int, int], key: rng.Key, offset: float = 0.0, multires: float = 0.0) -> Tensor:
    """Return the noise of the sample that `key` identifies, in fp32 on the host.

    Args:
        shape: (C, h, w).
        offset: strength of offset noise: one number per channel (Guttenberg 2023); 0: none.
        multires: discount of multi-resolution noise, see `add_lower_resolutions`; 0: none.
    """
    noise = rng.normal(shape, *key, "noise")
    if offset:
        noise += offset * rng.normal((shape[0], 1, 1), *key, "offset")
    return add_lower_resolutions(noise, key, multires) if multires else noise


def add_lower_resolutions(noise: Tensor, key: rng.Key, discount: float) -> Tensor:
    """Return white noise with noise of lower resolutions added, scaled to a standard deviation of 1.

    Level i = 1, 2, ... is white noise of side / r^i, enlarged to the latents and multiplied by discount^i. r is random
    in [2, 4) for each level. The last level has a side of 1 latent. Sources: Whitaker 2023,
    "Multi-Resolution Noise for Diffusion Model Training"; pyramid noise in kohya-ss/sd-scripts.

    Args:
        noise: white noise (C, h, w).
    """
    channels, height, width = noise.shape
    generator = rng.stream(*key, "pyramid")
    for level in range(1, LEVELS + 1):
        ratio = (2 + 2 * generator.random()) ** level
        low = max(1, int(height / ratio)), max(1, int(width / ratio))
        drawn = rng.normal((channels, *low), *key, "pyramid", level)
        noise = noise + discount**level * F.interpolate(drawn[None], (height, width), mode="bilinear")[0]
        if 1 in low:
            break
    return noise / torch.std(noise)
