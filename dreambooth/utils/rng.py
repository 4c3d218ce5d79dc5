"""Random numbers that are identified by a key instead of by the order of the draws.

Every draw has a key such as (seed, step, global sample index, "noise"). The same key gives the same numbers, in
every process and every micro-batch. Therefore a checkpoint contains no random state. The generator, Philox, is
counter-based (Salmon et al. 2011), so different keys give independent streams.
"""

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

Key = tuple[int | str, ...]


def stream(*key: int | str) -> np.random.Generator:
    """Return a new random generator that starts at the beginning of the stream of `key`."""
    philox_key: Any = _PhiloxKey(blake2b(repr(key).encode(), digest_size=16).digest())
    return np.random.Generator(np.random.Philox(philox_key))


class _PhiloxKey(ISeedSequence):
    """The key of Philox, given as its seed: with the argument `key`, numpy would also read entropy and drop it.

    numpy's type of a seed lacks ISeedSequence, therefore Any above.
    """

    def __init__(self, digest: bytes) -> None:
        self._words = np.frombuffer(digest, "<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> Any:
        """Return the two words of the key."""
        return self._words


@lru_cache(maxsize=64)
def permutation(count: int, *key: int | str) -> tuple[int, ...]:
    """Return a random permutation of range(count). Cached, because all samples of an epoch use the same permutation."""
    return tuple(map(int, stream(*key).permutation(count)))


def normal(shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """Return standard normal numbers of `shape`, fp32, drawn on the CPU so that they are the same for every device."""
    return torch.from_numpy(stream(*key).standard_normal(shape, dtype=np.float32))


def seed(*key: int | str) -> int:
    """Return a seed of 32 bits for a torch.Generator, whose CPU engine uses no more bits."""
    return int(stream(*key).integers(2**32))
