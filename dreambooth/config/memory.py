"""The config group `memory`: options that save GPU memory. Imports neither torch nor Hydra."""

from dataclasses import dataclass

from dreambooth.config.enums import EmaDevice, LatentCache, Rounding, Weights
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
