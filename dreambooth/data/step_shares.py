"""Which samples of a step each process computes, and in which micro-batches."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class StepShares:
    """Distributes the samples of a step over processes and micro-batches. Samples have global indices 0, 1, ...

    Attributes:
        batch_size: number of samples per micro-batch; with a global batch size, of the largest one.
        accumulation: number of micro-batches per process. Not used with a global batch size.
        rank: index of this process.
        world_size: number of processes.
        global_batch_size: number of samples of a step, over all processes, at least `world_size`; None: the product of
            batch_size, accumulation and world_size.
    """

    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    global_batch_size: int | None = None

    @property
    def samples_per_step(self) -> int:
        """Number of samples of a step, over all micro-batches and processes."""
        return self.global_batch_size or self.batch_size * self.accumulation * self.world_size

    @cached_property
    def micro_batches(self) -> list[range]:
        """The samples of a step that this process computes: one range of indices per micro-batch.

        With a global batch size, the processes share the samples as evenly as possible, and so do the micro-batches of
        a process, whose sizes differ by at most 1. All processes have the same number of micro-batches, unless one has
        too few samples.
        """
        if self.global_batch_size is None:
            starts = [(micro * self.world_size + self.rank) * self.batch_size for micro in range(self.accumulation)]
            return [range(start, start + self.batch_size) for start in starts]
        shares = split_evenly(range(self.global_batch_size), self.world_size)
        number = math.ceil(max(map(len, shares)) / self.batch_size)
        return split_evenly(shares[self.rank], min(number, len(shares[self.rank])))

    def loss_divisor(self, samples: int) -> float | None:
        """Return the number by which the loss of a micro-batch is divided; None: the number of micro-batches.

        The loss of a micro-batch is the mean over its n samples, and the gradients of W processes are averaged. With
        the divisor N / (n W), the result is the mean over the N samples of the step, however they are distributed over
        processes and micro-batches. If all micro-batches have the same size, the divisor is their number per process.

        Args:
            samples: number of samples of the micro-batch.
        """
        return None if self.global_batch_size is None else self.global_batch_size / (samples * self.world_size)


def split_evenly(indices: range, parts: int) -> list[range]:
    """Split a range into consecutive ranges whose lengths differ by at most 1."""
    bounds = [len(indices) * part // parts for part in range(parts + 1)]
    return [indices[first:last] for first, last in pairwise(bounds)]
