"""Replays recorded storage events through the allocator model to find the peak memory of each phase."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dreambooth.planner.allocation_trace import HOST, MARK, Event
from dreambooth.planner.caching_allocator import CachingAllocator


@dataclass
class Usage:
    """Peak memory of a phase, in bytes: allocated blocks, reserved segments, and live storages by category."""

    allocated: int = 0
    reserved: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """A point on the curve of memory over time: the live bytes of each category after an event in `phase`."""

    phase: str
    by_category: Mapping[str, int]


def replay(events: Sequence[Event], category: Mapping[int, str], marks: Sequence[str],
           allocator: CachingAllocator, cache_cleared_before: frozenset[str] = frozenset()) -> dict[str, Usage]:
    """Return the peak memory of each phase.

    Args:
        events, category, marks: the attributes of a StorageTrace that have these names.
        cache_cleared_before: phases that begin with a call of torch.cuda.empty_cache.
    """
    usage: dict[str, Usage] = {}
    blocks: dict[int, int] = {}  # serial number of a storage -> block of the allocator
    live: dict[str, int] = {}
    phase = ""
    current = Usage()
    for serial, size in events:
        if serial == MARK:
            phase = marks[size]
            if phase in cache_cleared_before:
                allocator.empty_cache()
            current = usage.setdefault(phase, Usage())
            _update_peak(current, allocator, live)
            continue
        kind = category[serial]
        if kind == HOST:
            continue
        live[kind] = live.get(kind, 0) + size
        if size > 0:
            blocks[serial] = allocator.malloc(size)
            _update_peak(current, allocator, live)
        else:
            allocator.release(blocks.pop(serial))
    return usage


def _update_peak(usage: Usage, allocator: CachingAllocator, live: Mapping[str, int]) -> None:
    usage.reserved = max(usage.reserved, allocator.reserved)
    if allocator.allocated > usage.allocated:
        usage.allocated = allocator.allocated
        usage.by_category = {kind: size for kind, size in live.items() if size}


def memory_curve(events: Sequence[Event], category: Mapping[int, str], marks: Sequence[str]) -> Iterator[Moment]:
    """Yield the live bytes of each category after each event, without the allocator's rounding and caching."""
    live: dict[str, int] = {}
    phase = ""
    for serial, size in events:
        if serial == MARK:
            phase = marks[size]
        elif category[serial] != HOST:
            live[category[serial]] = live.get(category[serial], 0) + size
        yield Moment(phase, dict(live))
