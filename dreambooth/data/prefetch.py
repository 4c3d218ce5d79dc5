"""Prepares the next step's samples in a background thread while the current step is computed.

The samples of a step are a function of the step's number (batches.py), so drawing them earlier does not change them.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, TypeVar

Samples = TypeVar("Samples")
BatchT = TypeVar("BatchT", covariant=True)


class BatchSource(Protocol[Samples, BatchT]):
    """Interface of objects that create the batches of a step in two stages, such as `Batches` in batches.py."""

    def draw(self, step: int, /) -> Samples:
        """Draw the samples of a step on the host. The Prefetcher's thread calls this method; calls never overlap."""

    def to_device(self, samples: Samples, /) -> BatchT:
        """Create the batches of a step on the device. The thread that calls the Prefetcher calls this method."""


class Prefetcher(Generic[Samples, BatchT]):
    """Callable that returns the batches of a step and draws the samples of the next step in a background thread.

    Steps may be requested in any order. If the requested step is not the one after the previously requested step, the
    caller waits while the samples of the requested step are drawn. An exception that `draw` raises for a step is raised
    when this step is requested. Use the object as a context manager, which ends the thread.
    """

    def __init__(self, source: BatchSource[Samples, BatchT], steps: int) -> None:
        """Args:
            source: the object that creates the batches.
            steps: number of steps of the whole run; no samples are drawn for later steps.
        """
        self._source, self._steps = source, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: tuple[int, Future[Samples]] | None = None

    def __call__(self, step: int) -> BatchT:
        pending, self._pending = self._pending, None
        future = pending[1] if pending and pending[0] == step else self._thread.submit(self._source.draw, step)
        samples = future.result()
        if step + 1 < self._steps:
            self._pending = step + 1, self._thread.submit(self._source.draw, step + 1)
        return self._source.to_device(samples)

    def __enter__(self) -> "Prefetcher[Samples, BatchT]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
