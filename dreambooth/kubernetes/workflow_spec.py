"""The inputs from which workflow files are rendered: overrides, a search space, a machine and an image."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dreambooth.config.hardware import Hardware

# Run folder of a trial, as Hydra's sweeper names it. The hash includes max_train_steps, so that trials that differ only
# in max_train_steps are separate runs.
TRIAL_RUN_DIR = "hydra.run.dir=${run_root}/${name}-${identity:sweep}"
TRACKING_URI = "${oc.env:MLFLOW_TRACKING_URI,null}"  # null: no server, but a SQLite database in run_root
TRACKING_OVERRIDE = f"tracking.uri={TRACKING_URI}"


@dataclass(frozen=True)
class SearchSpace:
    """A search space, from conf/sweep/NAME.yaml."""

    name: str
    values: Mapping[str, tuple[str, ...]]  # key -> values, written as in an override

    def without_overridden(self, overrides: Sequence[str]) -> "SearchSpace":
        """Return the space without the keys of the overrides: an override fixes its key, as under Hydra's sweepers."""
        fixed = {override.partition("=")[0].lstrip("+") for override in overrides}
        return SearchSpace(self.name, {key: values for key, values in self.values.items() if key not in fixed})

    def trials(self) -> list[tuple[str, ...]]:
        """Return the overrides of each run of the grid, in the order of Hydra's basic sweeper."""
        choices = [[f"{key}={value}" for value in values] for key, values in self.values.items()]
        return [(f"sweep={self.name}", *trial) for trial in itertools.product(*choices)]


@dataclass(frozen=True)
class WorkflowSpec:
    """The inputs of one set of workflow files."""

    overrides: tuple[str, ...]  # overrides of every run
    space: SearchSpace
    hardware: Hardware
    image: str
    overlays: Mapping[str, "WorkflowSpec"] = field(default_factory=dict)  # name of overlay -> spec of another machine

    @property
    def overrides_text(self) -> str:
        """The overrides as one string, quoted for a shell."""
        return shlex.join(self.overrides)


def run_overrides(spec: WorkflowSpec, run_root: str) -> list[str]:
    """Return the overrides of a run, one per command-line argument."""
    return [*spec.overrides, f"run_root={run_root}", TRACKING_OVERRIDE]
