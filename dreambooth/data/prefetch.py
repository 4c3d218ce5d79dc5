"""Prepares the next step's samples in a thread while a step is computed.

What a step's samples are depends on its number alone (data.py), so it does not matter when they are drawn.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, TypeVar

D = TypeVar("D")
B = TypeVar("B", covariant=True)


class Source(Protocol[D, B]):
    """What makes batches in two parts; data.Batches is one."""

    def draw(self, step: int, /) -> D:
        """The host's part; called in a thread, one call at a time."""

    def place(self, drawn: D, /) -> B:
        """The device's part; called where Ahead is."""


class Ahead(Generic[D, B]):
    """Called with a step it returns that step's batches and begins to draw the next one's.

    Any order of steps works; it only waits where a step is not the one after the last. What `draw` raises is raised
    where its step is asked for.
    """

    def __init__(self, source: Source[D, B], steps: int) -> None:
        """Args:
            steps: of the whole run; nothing is drawn for a step beyond them.
        """
        self._source, self._steps = source, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._waiting: tuple[int, Future[D]] | None = None

    def __call__(self, step: int) -> B:
        waiting, self._waiting = self._waiting, None
        future = waiting[1] if waiting and waiting[0] == step else self._thread.submit(self._source.draw, step)
        drawn = future.result()
        if step + 1 < self._steps:
            self._waiting = step + 1, self._thread.submit(self._source.draw, step + 1)
        return self._source.place(drawn)

    def __enter__(self) -> "Ahead[D, B]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
