"""Schedule of aspect-ratio buckets: determines which bucket each training step uses.

All samples of a step have the same size, because they form one tensor. The bucket is a function of the seed and the
step. It does not depend on the batch size or the number of processes, and a checkpoint does not need to store it.
"""

from collections.abc import Sequence
from functools import lru_cache

from dreambooth.utils import rng


def bucket_at(counts: Sequence[int], step: int, *key: int | str) -> tuple[int, int]:
    """Return the index of the bucket that a step uses, and the number of earlier steps of the run with this bucket.

    One round has sum(counts) steps. In a round, each bucket gets as many steps as it has photos, so that all photos are
    used equally often. The order of the buckets within a round is random and differs from round to round.

    Args:
        counts: number of photos in each bucket.
        step: number of completed steps before this one.
        key: the seed of the run and the name of the PhotoSet. They identify the random stream.
    """
    if len(counts) == 1:
        return 0, step
    number, position = divmod(step, sum(counts))
    bucket, earlier = _round_order(tuple(counts), *key, number)[position]
    return bucket, number * counts[bucket] + earlier


@lru_cache(maxsize=16)
def _round_order(counts: tuple[int, ...], *key: int | str) -> tuple[tuple[int, int], ...]:
    """Return one tuple per step of a round: (bucket index, number of earlier steps of the round with this bucket)."""
    buckets = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    used, order = [0] * len(counts), []
    for index in rng.permutation(len(buckets), *key, "sizes"):
        bucket = buckets[index]
        order.append((bucket, used[bucket]))
        used[bucket] += 1
    return tuple(order)
