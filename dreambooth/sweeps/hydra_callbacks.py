"""What Hydra calls around a sweep on this machine: trials are named by what differs, and their table is kept.

conf/config.yaml names `Sweep` as a callback, so that it works under every sweeper (basic, Optuna). The SageMaker
launcher keeps a table of its own.
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

STARTED = time.strftime("%Y-%m-%d_%H-%M-%S")  # the sweep's id, unless tracking.sweep names one
_swept: list[str] = []  # the keys that the sweep of this process varies


class Sweep(Callback):
    """Collects what the jobs of a sweep return; at its end writes results-ID.csv and a run in MLflow."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Path, list[str], float | None]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        words = [str(word) for word in config.hydra.overrides.task]
        parsed = OverridesParser.create().parse_overrides(words)
        spaces = [OmegaConf.select(config, f"hydra.sweeper.{name}") or {} for name in ("params", "search_space")]
        _swept[:] = dict.fromkeys([*(item.get_key_element().lstrip("+") for item in parsed if item.is_sweep_override()),
                                   *(str(key) for space in spaces for key in space)])

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        value = job_return._return_value
        number = float(value) if isinstance(value, int | float) and math.isfinite(value) else None
        folder = Path(str(OmegaConf.select(job_return.hydra_cfg, "hydra.runtime.output_dir")))
        self._jobs.append((folder, list(job_return.overrides or ()), number))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        launcher = str(config.hydra.runtime.choices.get("hydra/launcher"))
        if not self._jobs or launcher.startswith("sagemaker"):
            return
        from dreambooth.errors import DreamBoothError

        try:
            self._keep(config)
        except DreamBoothError as error:
            print(f"dreambooth: the table of the sweep is not complete: {error}", file=sys.stderr)

    def _keep(self, config: DictConfig) -> None:
        from dreambooth.sweeps import summary

        tracking = config.tracking
        path = summary.keep(
            self._jobs, tracking.sweep or STARTED, Path(str(config.run_root)), kind=tracking.kind.value,
            uri=tracking.uri, experiment=tracking.experiment)
        print(f"sweep {tracking.sweep or STARTED}: {path}", flush=True)


def telling(overrides: list[str]) -> list[str]:
    """The overrides that runs are told apart by: in a sweep those that it varies, otherwise all."""
    return [word for word in overrides if word.lstrip("+").partition("=")[0] in _swept] or overrides


def named(overrides: list[str]) -> str | None:
    """A trial by what differs, learning_rate=1e-4 prior_loss_weight=0; None: nothing that is known does."""
    pairs = [word.lstrip("+").partition("=")[::2] for word in overrides]
    from dreambooth.tracking.svg_charts import tidy

    return " ".join(f"{key.rpartition('.')[2]}={tidy(value)}" for key, value in pairs if key in _swept) or None
