"""The config group `method`: which weights are trained. Imports neither torch nor Hydra."""

from dataclasses import dataclass

from dreambooth.config.enums import BaseWeights, MethodKind, Targets
from dreambooth.config.section import Section, finite, require


@dataclass
class Method(Section):
    """Which weights are trained: all of them (full), or a low-rank adapter (lora, dora).

    The fields after `kind` apply to adapters only.
    """

    name: str = "full"
    kind: MethodKind = MethodKind.full
    rank: int = 16
    alpha: float | None = None
    targets: Targets = Targets.transformer
    dropout: float = 0.0
    base_weights: BaseWeights = BaseWeights.half
    merge: bool = False

    def __post_init__(self) -> None:
        require("method", {
            "rank": (1 <= self.rank <= 1024, f"from 1 to 1024, not {self.rank}"),
            "alpha": (self.alpha is None or (finite(self.alpha, 0) and self.alpha > 0),
                      f"above 0, or null for the rank, not {self.alpha}"),
            "dropout": (0 <= self.dropout < 1, f"in [0, 1), not {self.dropout}"),
        })

    @property
    def low_rank(self) -> bool:
        """Whether an adapter is trained and the base model is frozen."""
        return self.kind is not MethodKind.full

    @property
    def scale_alpha(self) -> float:
        """The value of `alpha`, or the rank if `alpha` is None."""
        return float(self.rank if self.alpha is None else self.alpha)
