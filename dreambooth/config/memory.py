"""The config group `memory`: options that save GPU memory. Imports neither torch nor Hydra."""

from collections.abc import Iterator
from dataclasses import dataclass

from dreambooth.config.enums import Dtype, EmaDevice, LatentCache, OptimizerKind, Rounding, Weights
from dreambooth.config.section import Section, require


@dataclass
class Memory(Section):
    """Options that change how a run is computed, but never which weights are trained.

    Only `ema_every`, `weights` and `rounding` may change the results.
    """

    auto: bool = False
    gradient_checkpointing: bool = False
    cache_latents: bool = True
    latent_cache: LatentCache = LatentCache.device
    cache_text: bool = True
    ema_device: EmaDevice = EmaDevice.same
    optimizer_in_backward: bool = False
    split_prior: bool = False
    autocast_cache: bool = True
    offload_optimizer: bool = False
    expandable_segments: bool = False
    max_split_size_mb: int | None = None
    ema_every: int = 1
    weights: Weights = Weights.full
    rounding: Rounding | None = None
    swap_blocks: int | None = None
    fully_shard: bool = False

    @property
    def split_pass(self) -> bool:
        """Whether each step runs a forward and backward pass for the photos, then another for the class images."""
        return self.split_prior and not self.optimizer_in_backward

    def __post_init__(self) -> None:
        require("memory", {
            "ema_every": (self.ema_every >= 1, f"1 or more, not {self.ema_every}"),
            "swap_blocks": (self.swap_blocks is None or self.swap_blocks >= 1,
                            f"1 or more, or null for none, not {self.swap_blocks}"),
            "max_split_size_mb": (self.max_split_size_mb is None or self.max_split_size_mb > 20,
                                  f"above 20, or null for no limit, not {self.max_split_size_mb}"),
        })


def sharding_problems(memory: Memory, low_rank: bool, dtype: Dtype, kind: OptimizerKind, compiled: bool,
                      channels_last: bool) -> Iterator[str]:
    """Yield one sentence per setting that memory.fully_shard=true does not allow.

    Args:
        low_rank: whether an adapter is trained.
        dtype: the precision of autocast.
        kind: the optimizer.
        compiled: train.compile.
        channels_last: train.channels_last.
    """
    if not memory.fully_shard:
        return
    off = "or memory.fully_shard=false"
    if low_rank:
        yield ("memory.fully_shard=true splits trained weights, and an adapter has few: type memory.fully_shard=false, "
               "or method=full")
    if not kind.allows_sharding:
        yield (f"memory.fully_shard=true gives each process a part of every weight, with which optimizer={kind.value} "
               f"computes other numbers or is not tested: type optimizer=adamw, optimizer=lion, {off}")
    if dtype is Dtype.fp16:
        yield f"memory.fully_shard=true is not tested with scaled losses (precision=fp16): type precision=bf16, {off}"
    conflicts = {"memory.optimizer_in_backward=false": memory.optimizer_in_backward,
                 "memory.offload_optimizer=false": memory.offload_optimizer,
                 "memory.weights=full memory.rounding=null": memory.weights is Weights.half,
                 "train.compile=false": compiled, "train.channels_last=false": channels_last}
    if needed := [override for override, is_on in conflicts.items() if is_on]:
        yield f"memory.fully_shard=true does not work with all options: type {' '.join(needed)}, {off}"
