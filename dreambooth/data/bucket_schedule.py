"""Schedule of aspect-ratio buckets: determines which bucket each training step uses.

All samples of a step have one size, because they form one tensor. The size is a function of the seed and the step, so
it does not depend on the batch size or the number of processes, and a resumed run needs no saved state.
"""

from collections.abc import Sequence
from functools import lru_cache

from dreambooth.utils import rng


def bucket_at(counts: Sequence[int], step: int, *key: int | str) -> tuple[int, int]:
    """Return the bucket of a step, and how many earlier steps used the same bucket.

    One round has sum(counts) steps. In a round, each bucket gets as many steps as it has photos, so that all photos are
    used equally often. Each round has a new random order.

    Args:
        counts: number of photos in each bucket.
        step: completed steps before this one.
        key: names the random stream, such as the seed.
    """
    if len(counts) == 1:
        return 0, step
    number, position = divmod(step, sum(counts))
    bucket, earlier = _round_order(tuple(counts), *key, number)[position]
    return bucket, number * counts[bucket] + earlier


@lru_cache(maxsize=16)
def _round_order(counts: tuple[int, ...], *key: int | str) -> tuple[tuple[int, int], ...]:
    """Return for each step of one round: its bucket, and how many earlier steps of the round used that bucket."""
    buckets = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    used, order = [0] * len(counts), []
    for index in rng.permutation(len(buckets), *key, "sizes"):
        bucket = buckets[index]
        order.append((bucket, used[bucket]))
        used[bucket] += 1
    return tuple(order)
