"""Plays recorded storage events through the allocator's model: how much of what is there at the peak of each phase."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dreambooth.planner.allocation_trace import HOST, MARK, Event
from dreambooth.planner.caching_allocator import CachingAllocator


@dataclass
class Usage:
    """Bytes at the fullest moment of a phase: the allocator's blocks and segments, plain storages by category."""

    allocated: int = 0
    reserved: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """A point of the curve of memory over time: bytes by category after an event of `phase`."""

    phase: str
    by_category: Mapping[str, int]


def replay(events: Sequence[Event], category: Mapping[int, str], marks: Sequence[str],
           allocator: CachingAllocator, emptied_before: frozenset[str] = frozenset()) -> dict[str, Usage]:
    """Usage by phase. `emptied_before`: phases at whose beginning the run calls torch.cuda.empty_cache."""
    usage: dict[str, Usage] = {}
    blocks: dict[int, int] = {}
    now: dict[str, int] = {}
    phase = ""
    current = Usage()
    for serial, size in events:
        if serial == MARK:
            phase = marks[size]
            if phase in emptied_before:
                allocator.empty_cache()
            current = usage.setdefault(phase, Usage())
            _note(current, allocator, now)
            continue
        kind = category[serial]
        if kind == HOST:
            continue
        now[kind] = now.get(kind, 0) + size
        if size > 0:
            blocks[serial] = allocator.malloc(size)
            _note(current, allocator, now)
        else:
            allocator.release(blocks.pop(serial))
    return usage


def curve(events: Sequence[Event], category: Mapping[int, str], marks: Sequence[str]) -> Iterator[Moment]:
    """Memory over time, by category, without the allocator."""
    now: dict[str, int] = {}
    phase = ""
    for serial, size in events:
        if serial == MARK:
            phase = marks[size]
        elif category[serial] != HOST:
            now[category[serial]] = now.get(category[serial], 0) + size
        yield Moment(phase, dict(now))


def _note(usage: Usage, allocator: CachingAllocator, now: Mapping[str, int]) -> None:
    usage.reserved = max(usage.reserved, allocator.reserved)
    if allocator.allocated > usage.allocated:
        usage.allocated = allocator.allocated
        usage.by_category = {kind: size for kind, size in now.items() if size}
