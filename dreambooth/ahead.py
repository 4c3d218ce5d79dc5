"""Prepares the next step's samples in a thread while a step is computed.

What a step's samples are depends on its number alone (data.py), so it does not matter when they are drawn.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

D = TypeVar("D")
B = TypeVar("B")


class Ahead(Generic[D, B]):
    """Called with a step it returns that step's batches and begins to draw the next one's.

    Any order of steps works; it only waits where a step is not the one after the last. What `draw` raises is raised
    where its step is asked for.
    """

    def __init__(self, draw: Callable[[int], D], place: Callable[[D], B], steps: int) -> None:
        """Args:
            draw: the host's part of a step's batches; runs in a thread, one call at a time.
            place: the device's part; runs where this is called.
            steps: of the whole run; nothing is drawn for a step beyond them.
        """
        self._draw, self._place, self._steps = draw, place, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._waiting: tuple[int, Future[D]] | None = None

    def __call__(self, step: int) -> B:
        waiting, self._waiting = self._waiting, None
        future = waiting[1] if waiting and waiting[0] == step else self._thread.submit(self._draw, step)
        drawn = future.result()
        if step + 1 < self._steps:
            self._waiting = step + 1, self._thread.submit(self._draw, step + 1)
        return self._place(drawn)

    def __enter__(self) -> "Ahead[D, B]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
