"""Prepares the next step's samples in a background thread while the current step is computed.

A step's samples are a function of its number (batches.py), so it does not matter when they are drawn.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, TypeVar

Samples = TypeVar("Samples")
BatchT = TypeVar("BatchT", covariant=True)


class BatchSource(Protocol[Samples, BatchT]):
    """Interface of objects that create a step's batches in two stages, such as `Batches` in batches.py."""

    def draw(self, step: int, /) -> Samples:
        """Draw the samples on the host; called in the background thread, one call at a time."""

    def to_device(self, samples: Samples, /) -> BatchT:
        """Create the batches on the device; called in the thread that calls the Prefetcher."""


class Prefetcher(Generic[Samples, BatchT]):
    """Callable that returns a step's batches and starts drawing the next step's samples in a background thread.

    Steps may be requested in any order; a step that does not follow the last one is drawn while the caller waits. An
    exception in `draw` is raised when its step is requested. Use the object as a context manager, to end the thread.
    """

    def __init__(self, source: BatchSource[Samples, BatchT], steps: int) -> None:
        """Args:
            source: creates the batches.
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
