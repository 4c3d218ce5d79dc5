"""Whose turn it is: which group of photos of one size has a step.

A step has one size, whatever number of samples it has and whoever computes them: which one is a function of the step,
as everything in data.py is.
"""

from collections.abc import Sequence
from functools import lru_cache

from dreambooth.utils import rng


def turn(counts: Sequence[int], step: int, *key: int | str) -> tuple[int, int]:
    """(group, how many steps of it came before) for groups of `counts` photos.

    In sum(counts) steps each group has as many steps as it has photos, so that all photos come equally often.
    """
    if len(counts) == 1:
        return 0, step
    lap, place = divmod(step, sum(counts))
    group, before = _lap(tuple(counts), *key, lap)[place]
    return group, lap * counts[group] + before


@lru_cache(maxsize=16)
def _lap(counts: tuple[int, ...], *key: int | str) -> tuple[tuple[int, int], ...]:
    members = [group for group, count in enumerate(counts) for _ in range(count)]
    seen, found = [0] * len(counts), []
    for place in rng.order(len(members), *key, "sizes"):
        group = members[place]
        found.append((group, seen[group]))
        seen[group] += 1
    return tuple(found)
