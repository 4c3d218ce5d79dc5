"""Random numbers by name instead of by order.

Every draw has a key such as (seed, step, global sample index, stream). Who computes a sample, in which
micro-batch and on which process, does not matter: the same key gives the same numbers. Nothing needs to be
saved for a resume. Philox is counter-based (Salmon et al. 2011), so distinct keys are independent streams.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch

Key = tuple[int | str, ...]


def stream(*key: int | str) -> np.random.Generator:
    """The random stream that belongs to `key`."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@lru_cache(maxsize=64)
def order(count: int, *key: int | str) -> tuple[int, ...]:
    """A permutation of `count` things; it is asked for once a sample and drawn once."""
    return tuple(map(int, stream(*key).permutation(count)))


def normal(shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """Standard normal numbers of `shape`, fp32 on the CPU: the same on every device."""
    return torch.from_numpy(stream(*key).standard_normal(shape, dtype=np.float32))


def seed(*key: int | str) -> int:
    """A seed for a torch.Generator, whose CPU engine reads 32 bits."""
    return int(stream(*key).integers(2**32))
