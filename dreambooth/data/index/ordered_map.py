"""A map over threads that keeps the order of its items and holds only a few results at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# While it is loaded at 512 px, a PNG of 12 megapixels takes 98 MiB (146 MiB with transparency), one of 24 megapixels
# 194 MiB (295 MiB), and a JPEG of 24 megapixels 51 MiB (90 MiB if progressive): the growth of the peak memory of a
# process. Larger photos are decoded one at a time, see LARGE_PIXELS in photos.py.
MAX_THREADS = 8


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
