"""The config group `flow`: which noise levels a model of flow matching is trained on.

Imports neither torch nor Hydra.
"""

from dataclasses import dataclass, fields

from dreambooth.config.enums import LossWeighting, TimestepSampling
from dreambooth.config.section import Section, finite, require


@dataclass
class Flow(Section):
    """Timestep sampling, shift and loss weighting of flow matching (Esser et al. 2024, arXiv:2403.03206, sec. 3.1).

    Other models, which are trained to predict noise or v, do not use these settings.
    """

    timestep_sampling: TimestepSampling = TimestepSampling.logit_normal
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float | None = None
    loss_weighting: LossWeighting = LossWeighting.none

    def __post_init__(self) -> None:
        require("flow", {
            "logit_mean": (finite(self.logit_mean, -10, 10), f"from -10 to 10, not {self.logit_mean}"),
            "logit_std": (finite(self.logit_std, 0, 10) and self.logit_std > 0,
                          f"above 0 and at most 10, not {self.logit_std}"),
            "mode_scale": (finite(self.mode_scale, -1, 1.75), f"from -1 to 1.75, not {self.mode_scale}"),
            "shift": (self.shift is None or (finite(self.shift, 0, 100) and self.shift > 0),
                      f"above 0 and at most 100, or null for the base model's, not {self.shift}"),
        })

    @property
    def changed_keys(self) -> list[str]:
        """The keys, such as flow.shift, whose values differ from the defaults."""
        default = Flow()
        return [f"flow.{field.name}" for field in fields(self)
                if getattr(self, field.name) != getattr(default, field.name)]
