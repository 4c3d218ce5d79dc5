"""What workflow files are made from: overrides, a search space, a machine, an image."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dreambooth.config.hardware import Hardware

# A run of a sweep lives where Hydra's own sweeper would put it: swept max_train_steps make a run each.
TRIAL = "hydra.run.dir=${run_root}/${name}-${identity:sweep}"
HERE = "${oc.env:MLFLOW_TRACKING_URI,null}"  # sqlite in run_root where there is no server
SERVER = f"tracking.uri={HERE}"


@dataclass(frozen=True)
class Space:
    """A search space, conf/sweep/NAME.yaml."""

    name: str
    values: Mapping[str, tuple[str, ...]]  # key -> as they are typed

    def without(self, words: Sequence[str]) -> "Space":
        """The same without the keys that are typed: they are fixed, as under Hydra's sweepers."""
        typed = {word.partition("=")[0].lstrip("+") for word in words}
        return Space(self.name, {key: values for key, values in self.values.items() if key not in typed})

    def trials(self) -> list[tuple[str, ...]]:
        """The overrides of each run of the grid, in the order of Hydra's basic sweeper."""
        words = [[f"{key}={value}" for value in values] for key, values in self.values.items()]
        return [(f"sweep={self.name}", *chosen) for chosen in itertools.product(*words)]


@dataclass(frozen=True)
class Asked:
    """One set of files."""

    overrides: tuple[str, ...]  # of every run
    space: Space
    hardware: Hardware
    image: str
    machines: Mapping[str, "Asked"] = field(default_factory=dict)  # overlay -> the same for another machine

    @property
    def typed(self) -> str:
        """The overrides as one text, as they are typed into a shell."""
        return shlex.join(self.overrides)


def run_words(asked: Asked, root: str, trial: Sequence[str] = ()) -> list[str]:
    """The overrides of a run, or of a trial, one a word."""
    return [*asked.overrides, f"run_root={root}", SERVER, *trial, *([TRIAL] if trial else ())]
