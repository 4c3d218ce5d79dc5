"""Hydra callback for a sweep on this machine. It writes the results table, and records which keys the sweep varies.

The names of the trials contain these keys. The callback is the class `Sweep`. It is listed in conf/config.yaml, so that
it works with every sweeper (basic, Optuna). For a sweep on SageMaker, the SageMaker launcher writes the results table
instead.
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dreambooth.utils.key_names import short_names
from dreambooth.utils.masking import mask_urls

DEFAULT_SWEEP_ID = time.strftime("%Y-%m-%d_%H-%M-%S")  # the sweep's ID if tracking.sweep is not set
_varied_keys: list[str] = []  # configuration keys that the current sweep varies
failure_reasons: dict[Path, str] = {}  # run folder -> why its run in this process failed, in one sentence


class Sweep(Callback):
    """Collects the results of a sweep's runs. When the sweep ends, writes a table and logs the sweep as an MLflow run.

    The table is results-ID.csv, where ID is the sweep's ID.
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[Path, list[str], float | None]] = []  # run folder, overrides, objective

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        overrides = [str(override) for override in config.hydra.overrides.task]
        parsed = OverridesParser.create().parse_overrides(overrides)
        spaces = [OmegaConf.select(config, f"hydra.sweeper.{name}") or {} for name in ("params", "search_space")]
        typed = [item.get_key_element().lstrip("+") for item in parsed if item.is_sweep_override()]
        _varied_keys[:] = dict.fromkeys([*typed, *(str(key) for space in spaces for key in space)])

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        value = job_return._return_value
        objective = float(value) if isinstance(value, int | float) and math.isfinite(value) else None
        folder = Path(str(OmegaConf.select(job_return.hydra_cfg, "hydra.runtime.output_dir")))
        self._jobs.append((folder, list(job_return.overrides or ()), objective))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        launcher = str(config.hydra.runtime.choices.get("hydra/launcher"))
        if not self._jobs or launcher.startswith("sagemaker"):
            return
        from dreambooth.errors import DreamBoothError

        try:
            self._write_summary(config)
        except DreamBoothError as error:
            print(f"dreambooth: the table of the sweep is not complete: {error}", file=sys.stderr)

    def _write_summary(self, config: DictConfig) -> None:
        from dreambooth.cloud.sweep_results import next_commands
        from dreambooth.sweeps import summary

        tracking = config.tracking
        sweep = tracking.sweep or DEFAULT_SWEEP_ID
        path = summary.write_summary(self._jobs, sweep, Path(str(config.run_root)), kind=tracking.kind.value,
                                     uri=tracking.uri, experiment=tracking.experiment, reasons=failure_reasons)
        print("\n".join([f"sweep {sweep}: {path}", *next_commands(sweep, path.parent)]), flush=True)


def distinguishing_overrides(overrides: list[str]) -> list[str]:
    """Return the overrides that distinguish a run from other runs.

    In a sweep, these are the overrides of keys that the sweep varies. Otherwise, all overrides are returned.
    """
    return [override for override in overrides if _key(override) in _varied_keys] or overrides


def trial_name(overrides: list[str]) -> str | None:
    """Return a trial's name: the keys that the sweep varies, with their values in this trial.

    An example is "learning_rate=1e-4 prior_loss_weight=0". Return None if `overrides` has no key that the sweep varies.
    """
    from dreambooth.tracking.svg_charts import format_setting

    names = short_names(_varied_keys)
    return mask_urls(" ".join(f"{names[_key(override)]}={format_setting(override.partition('=')[2])}"
                              for override in overrides if _key(override) in names)) or None


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
