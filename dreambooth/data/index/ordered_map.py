"""A map over threads that keeps the order of its items and holds only a few results at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 8  # a photo of 12 megapixels takes up to 40 MB while it is decoded


def available_threads() -> int:
    """Return the number of CPUs that this process may use, at most MAX_THREADS."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MAX_THREADS)


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item],
                threads: int | None = None) -> Iterator[Result]:
    """Yield function(item) for each item, in the order of the items.

    The result does not depend on the number of threads. At most 2 results per thread exist at a time, so that memory
    does not grow with the number of items.

    Args:
        function: called in threads; its exceptions are raised in the caller's thread.
        threads: number of threads; 1: the caller's thread alone; None: `available_threads`.
    """
    threads = available_threads() if threads is None else threads
    if threads == 1:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="photos") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
