"""The queue of pictures to draw: bounded, fair, and read in batches of requests that can be drawn together."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from dreambooth.inference.picture_request import PictureRequest
from dreambooth.serving.refusals import Refused


def ignore_step(done: int, total: int) -> None:
    """Ignore the progress of a picture."""


@dataclass(eq=False)
class Job:
    """One picture to draw.

    Attributes:
        result: gets the PNG file, or Refused. It is cancelled if nobody waits for the picture any more.
        key: jobs with equal keys can be drawn in one batch.
        on_step: called with the number of denoising steps that are done, and that of all steps.
        arrived: when the job was put into the queue, in seconds of the monotonic clock.
    """

    request: PictureRequest
    key: Hashable
    result: "asyncio.Future[bytes]"
    on_step: Callable[[int, int], None] = ignore_step
    arrived: float = field(default_factory=time.monotonic)


class PictureQueue:
    """Jobs in the order of their arrival.

    Args:
        capacity: the highest number of jobs. Jobs that are being drawn do not count.
        max_batch: the highest number of jobs in a batch.
        max_wait: seconds for which the oldest job waits for others of its key.
    """

    def __init__(self, capacity: int, max_batch: int, max_wait: float) -> None:
        self.capacity, self.max_batch, self.max_wait = capacity, max_batch, max_wait
        self._jobs: deque[Job] = deque()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, jobs: Sequence[Job], retry_after: int) -> None:
        """Append the jobs of one request: all or none.

        Raises:
            Refused: the queue has no room for all of them (status 429).
        """
        if len(self._jobs) + len(jobs) > self.capacity:
            raise Refused(429, f"the queue is full ({len(self._jobs)} of {self.capacity} pictures wait): try again "
                          f"in {retry_after} s", retry_after)
        self._jobs.extend(jobs)
        self._changed.set()

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Put jobs of a batch, which no worker has begun, back to the front."""
        self._jobs.extendleft(reversed(jobs))
        self._changed.set()

    def discard(self, job: Job) -> None:
        """Remove a job for which nobody waits any more. Nothing happens if the queue does not hold it."""
        if job in self._jobs:
            self._jobs.remove(job)

    async def next_batch(self) -> list[Job]:
        """Wait for a batch, remove its jobs from the queue and return them.

        A batch is ready if it is full, or if its oldest job has waited for `max_wait`. Of several ready batches the one
        with the oldest job is next, so that no key waits for ever. Cancelling the call loses no job.
        """
        while True:
            self._changed.clear()
            batch, seconds = self._ready_batch(time.monotonic())
            if batch:
                taken = set(map(id, batch))
                self._jobs = deque(job for job in self._jobs if id(job) not in taken)
                return batch
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):  # wait_for of Python 3.11 can ignore a cancellation
                    await self._changed.wait()

    def _ready_batch(self, now: float) -> tuple[list[Job], float | None]:
        """Return the next batch, or an empty list and the seconds until a batch is ready (None: the queue is empty)."""
        by_key: dict[Hashable, list[Job]] = {}
        for job in self._jobs:
            by_key.setdefault(job.key, []).append(job)
        for jobs in by_key.values():  # in the order of their oldest job
            if len(jobs) >= self.max_batch or now - jobs[0].arrived >= self.max_wait:
                return jobs[:self.max_batch], None
        oldest = min((jobs[0].arrived for jobs in by_key.values()), default=None)
        return [], None if oldest is None else max(0.0, oldest + self.max_wait - now)
