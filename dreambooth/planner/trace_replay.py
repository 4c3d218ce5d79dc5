"""Replays recorded storage events through the allocator model to find the peak memory of each phase.

Also splits the events of a run with memory.fully_shard, which is rehearsed in one process, over several processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from dreambooth.planner.allocation_trace import HOST, MARK, Event, StorageTrace
from dreambooth.planner.caching_allocator import CachingAllocator

SHARDED = ("gradients", "optimizer", "ema")  # categories of which each process has a part
WHOLE_PHASES = ("validation", "sample", "evaluate", "save")  # phases after training steps, with whole weights


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


def split_over_processes(trace: StorageTrace, model: nn.Module, gathered: int, processes: int) -> None:
    """Change the events of a trace to those of one process of a run with memory.fully_shard.

    From the phase `training` on, a process has its part of trained weights, gradients, optimizer state and EMA. During
    training steps it has whole copies of what is gathered, and afterwards a whole copy of the trained weights. Tensors
    in host memory are left whole, because all processes of a host have them together.

    Args:
        model: the trained module.
        gathered: bytes of the whole weights and gradients that exist during a training step.
        processes: number of processes.
    """
    weights = {trace.serial_of(parameter) for parameter in model.parameters() if parameter.requires_grad}
    copies = max(trace.category) + 1  # serial number of what is gathered; the next one is that of the whole weights
    trace.category |= {copies: "weights", copies + 1: "weights"}
    whole: dict[int, int] = {}  # bytes of each trained weight, by serial number
    events: list[Event] = []
    before, steps, after = range(3)
    period = before

    def part(size: int) -> int:
        return -(-size // processes) if size > 0 else -part(-size)

    for serial, size in trace.events:
        if serial == MARK:
            events.append((serial, size))
            phase = trace.marks[size]
            if phase == "training":
                period = steps
                for weight, bytes_ in whole.items():
                    events += [(weight, -bytes_), (weight, part(bytes_))]
                events.append((copies, gathered))
            elif period == steps and phase in WHOLE_PHASES:
                period = after
                events += [(copies, -gathered), (copies + 1, sum(whole.values()))]
            continue
        if serial in weights and size > 0:
            whole[serial] = size
        is_split = period != before and (serial in weights or trace.category[serial] in SHARDED)
        events.append((serial, part(size) if is_split else size))
    trace.events = events
