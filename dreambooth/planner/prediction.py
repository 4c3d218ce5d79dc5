"""What a rehearsal of a run showed: memory by phase and category, work by phase. Plain numbers, in bytes."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from dreambooth.planner.allocation_trace import HOST, StorageTrace
from dreambooth.planner.caching_allocator import CachingAllocator
from dreambooth.planner.trace_replay import Usage, replay

STEP = ("forward", "backward", "step", "ema")  # the phases of a training step
EMPTIED = frozenset({"caching", "training"})  # a run empties the allocator's cache when one of these begins


@dataclass(frozen=True)
class Prediction:
    """A recorded run. A step's phases are seen twice, the second time with the optimizer's state there."""

    trace: StorageTrace = field(repr=False)
    trained: int  # weights
    frozen: int  # weights
    trained_bytes: int  # on the card
    picture_flops: tuple[int, int]  # of a class image: one denoising step, decoding
    encode_flops: int  # of one photo
    expandable: bool = False
    max_split: int | None = None

    @cached_property
    def by_phase(self) -> dict[str, Usage]:
        """Usage at the fullest moment of each phase."""
        found = replay(self.trace.events, self.trace.category, self.trace.marks,
                       CachingAllocator(self.expandable, self.max_split), EMPTIED)
        return {phase: usage for phase, usage in found.items() if phase not in ("idle", "training")}

    @property
    def reserved(self) -> int:
        return max(usage.reserved for usage in self.by_phase.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.by_phase, key=lambda phase: self.by_phase[phase].allocated)

    @property
    def peak(self) -> Usage:
        return self.by_phase[self.peak_phase]

    def most(self, *phases: str) -> Usage:
        """Some phases as one: the most that is reserved in any, and what is there at the fullest moment."""
        found = [usage for phase, usage in self.by_phase.items() if phase in phases]
        fullest = max(found, key=lambda usage: usage.allocated)
        return replace(fullest, reserved=max(usage.reserved for usage in found))

    @property
    def step_flops(self) -> int:
        """Floating-point operations of one optimizer step, all micro-batches."""
        return sum(self.trace.flops.get(phase, 0) for phase in STEP)

    @cached_property
    def host(self) -> int:
        """Bytes in host memory instead of on the card: EMA, optimizer, fp32 weights, gradients."""
        now = most = 0
        for serial, size in self.trace.events:
            if serial > 0 and self.trace.category[serial] == HOST:
                now += size
                most = max(most, now)
        return most
