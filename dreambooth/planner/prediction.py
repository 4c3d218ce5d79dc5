"""Holds the result of a rehearsal: bytes of memory by phase and category, and operations by phase."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from dreambooth.planner.allocation_trace import HOST, StorageTrace
from dreambooth.planner.caching_allocator import CachingAllocator
from dreambooth.planner.trace_replay import Usage, replay

STEP_PHASES = ("forward", "backward", "step", "ema")  # the phases of a training step
# A run empties the allocator's cache before these phases.
CACHE_CLEARED_BEFORE = frozenset({"load", "caching", "training"})


@dataclass(frozen=True)
class Prediction:
    """The memory and the operations of a run, calculated from the trace of its rehearsal.

    The trace contains two training steps. The first step creates the optimizer state at its end. The second step has
    this state in memory from its beginning, as all later steps of a real run do.
    """

    trace: StorageTrace = field(repr=False)
    trained_parameters: int  # elements
    frozen_parameters: int  # elements, without text encoders that are released before the denoiser is loaded
    encoder_bytes: int  # weights of text encoders that are released before the denoiser is loaded
    picture_flops: tuple[int, int]  # for one generated image: (one denoising step, decoding)
    encode_flops: int  # for one photo
    block_bytes: tuple[int, ...] = ()  # sizes of the denoiser's blocks that memory.swap_blocks can move
    copied_bytes: tuple[int, int] = (0, 0)  # by memory.swap_blocks: in a step, and in a denoising step of one image
    validation_flops: int = 0  # for one noisy copy of a held-out photo
    steps: int = 1  # training steps whose operations the trace contains
    expandable: bool = False  # PyTorch's setting expandable_segments
    max_split: int | None = None  # PyTorch's setting max_split_size_mb, in bytes

    @cached_property
    def by_phase(self) -> dict[str, Usage]:
        """Peak usage of each phase."""
        usage = replay(self.trace.events, self.trace.category, self.trace.marks,
                       CachingAllocator(self.expandable, self.max_split), CACHE_CLEARED_BEFORE)
        return {phase: peak for phase, peak in usage.items() if phase not in ("idle", "training")}

    @property
    def reserved(self) -> int:
        """The largest number of bytes that the allocator reserves in any phase."""
        return max(usage.reserved for usage in self.by_phase.values())

    @property
    def peak_phase(self) -> str:
        """The phase with the most allocated memory."""
        return max(self.by_phase, key=lambda phase: self.by_phase[phase].allocated)

    @property
    def peak(self) -> Usage:
        """The usage of the peak phase."""
        return self.by_phase[self.peak_phase]

    def peak_over(self, *phases: str) -> Usage:
        """Return the usage of the phase with the most allocated memory among `phases`.

        The attribute `reserved` of the result is an exception: it is the largest `reserved` of all `phases`.
        """
        usages = [usage for phase, usage in self.by_phase.items() if phase in phases]
        peak = max(usages, key=lambda usage: usage.allocated)
        return replace(peak, reserved=max(usage.reserved for usage in usages))

    @property
    def step_flops(self) -> int:
        """Floating-point operations of one optimizer step, over all its micro-batches: a mean if steps differ."""
        return sum(self.trace.flops.get(phase, 0) for phase in STEP_PHASES) // self.steps

    @cached_property
    def host_bytes(self) -> int:
        """Peak bytes of tensors that memory options keep on the host: EMA, optimizer state, fp32 weights, gradients."""
        live = peak = 0
        for serial, size in self.trace.events:
            if serial > 0 and self.trace.category[serial] == HOST:
                live += size
                peak = max(peak, live)
        return peak
