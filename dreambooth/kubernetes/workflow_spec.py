"""What workflow files are rendered from: overrides, a search space, a machine and an image."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dreambooth.config.hardware import Hardware

# Run folder of a trial, as Hydra's sweeper names it. The hash includes max_train_steps, so that trials which differ in
# it alone are separate runs.
TRIAL_RUN_DIR = "hydra.run.dir=${run_root}/${name}-${identity:sweep}"
TRACKING_URI = "${oc.env:MLFLOW_TRACKING_URI,null}"  # without a server: SQLite in run_root
TRACKING_OVERRIDE = f"tracking.uri={TRACKING_URI}"


@dataclass(frozen=True)
class SearchSpace:
    """A search space, conf/sweep/NAME.yaml."""

    name: str
    values: Mapping[str, tuple[str, ...]]  # key -> values, as they are typed in an override

    def without_overridden(self, overrides: Sequence[str]) -> "SearchSpace":
        """The space without the keys of these overrides: an override fixes its key, as under Hydra's sweepers."""
        fixed = {override.partition("=")[0].lstrip("+") for override in overrides}
        return SearchSpace(self.name, {key: values for key, values in self.values.items() if key not in fixed})

    def trials(self) -> list[tuple[str, ...]]:
        """The overrides of each run of the grid, in the order of Hydra's basic sweeper."""
        choices = [[f"{key}={value}" for value in values] for key, values in self.values.items()]
        return [(f"sweep={self.name}", *trial) for trial in itertools.product(*choices)]


@dataclass(frozen=True)
class WorkflowSpec:
    """The inputs of one set of workflow files."""

    overrides: tuple[str, ...]  # of every run
    space: SearchSpace
    hardware: Hardware
    image: str
    overlays: Mapping[str, "WorkflowSpec"] = field(default_factory=dict)  # overlay -> the spec of another machine

    @property
    def overrides_text(self) -> str:
        """The overrides as one text, quoted for a shell."""
        return shlex.join(self.overrides)


def run_overrides(spec: WorkflowSpec, run_root: str) -> list[str]:
    """The overrides of a run, one per argument."""
    return [*spec.overrides, f"run_root={run_root}", TRACKING_OVERRIDE]
