"""Hydra callbacks for sweeps. They are listed in conf/*.yaml, so that they work with every sweeper (basic, Optuna).

`Sweep` writes the results table of a sweep on this machine, and records which keys the sweep varies. The names of the
trials contain these keys. For a sweep on SageMaker, the SageMaker launcher writes the results table instead.
`Jobs` refuses sweeps whose results would be lost, and lets sweeps search texts that need quotes.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dreambooth.config import validation
from dreambooth.config.compose import choice_texts, unquote
from dreambooth.config.overrides import parse
from dreambooth.errors import DreamBoothError, UserError
from dreambooth.utils.key_names import short_names
from dreambooth.utils.masking import mask_urls

_default_sweep_id = [time.strftime("%Y-%m-%d_%H-%M-%S")]  # the sweep's ID if tracking.sweep is not set
_varied_keys: list[str] = []  # configuration keys that the current sweep varies
failure_reasons: dict[Path, str] = {}  # run folder -> why its run in this process failed, in one sentence
job_failures: list[Exception] = []  # one per job that failed in another process, added by our launchers
_running: list[tuple["Sweep", DictConfig]] = []  # the sweep that has begun and not ended, and its configuration


class Jobs(Callback):
    """Refuses some sweeps before their first job, and keeps the quotes of searched texts.

    Launchers such as joblib and submitit are refused, because the errors and results of their jobs do not reach this
    process: the command would end with 0, without a message and without a results table.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for problem in _sweep_problems(config):
            print(f"dreambooth: {problem}", file=sys.stderr)
            sys.exit(UserError.exit_code)  # Hydra turns an exception of a callback into a warning
        _keep_quotes(config)


class Sweep(Callback):
    """Collects the results of a sweep's runs. When the sweep ends, writes a table and logs the sweep as an MLflow run.

    The table is results-ID.csv, where ID is the sweep's ID.
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[Path, list[str], float | None]] = []  # run folder, overrides, objective

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _running[:] = [(self, config)]
        parsed = OverridesParser.create().parse_overrides(_unresolved(config, "hydra.overrides.task"))
        spaces = [OmegaConf.select(config, f"hydra.sweeper.{name}") or {} for name in ("params", "search_space")]
        typed = [item.get_key_element().lstrip("+") for item in parsed if item.is_sweep_override()]
        _varied_keys[:] = dict.fromkeys([*typed, *(str(key) for space in spaces for key in space)])

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        self._jobs.append((_output_dir(job_return), list(job_return.overrides or ()), _objective(job_return)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _running.clear()
        launcher = str(config.hydra.runtime.choices.get("hydra/launcher"))
        if not self._jobs or launcher.startswith("sagemaker"):
            return
        try:
            self._write_summary(config)
        except DreamBoothError as error:
            print(f"dreambooth: the table of the sweep is not complete: {error}", file=sys.stderr)

    def _write_summary(self, config: DictConfig) -> None:
        from dreambooth.sweeps import summary

        tracking = config.tracking
        sweep = tracking.sweep or default_sweep_id()
        root = Path(str(config.run_root))
        lines = summary.write_summary(self._jobs, sweep, root, kind=tracking.kind.value,
                                      uri=tracking.uri, experiment=tracking.experiment, reasons=failure_reasons)
        print("\n".join(lines), flush=True)


def default_sweep_id() -> str:
    """Return the ID of a sweep for which tracking.sweep is not set."""
    return _default_sweep_id[0]


def set_default_sweep_id(sweep: str) -> None:
    """Set the ID of a sweep for which tracking.sweep is not set: a study that is continued keeps its ID."""
    _default_sweep_id[0] = sweep


def _sweep_problems(config: DictConfig) -> Iterator[str]:
    """Yield one sentence per reason why the sweep must not begin."""
    name = str(config.hydra.runtime.choices.get("hydra/launcher"))
    if name not in ("basic", "slurm", "slurm_schema") and not name.startswith("sagemaker"):
        yield (f"hydra/launcher={name} runs the jobs of a sweep in other processes, whose results would be lost: type "
               f"hydra/launcher={'slurm' if 'slurm' in name else 'basic'}")
    name = OmegaConf.select(config, "tracking.sweep", throw_on_resolution_failure=False)
    yield from validation.name_problem("tracking.sweep", name)


def _objective(job_return: Any) -> float | None:
    value = job_return._return_value
    value = value[0] if isinstance(value, list) and value else value  # several objectives
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _output_dir(job_return: Any) -> Path:
    return Path(str(OmegaConf.select(job_return.hydra_cfg, "hydra.runtime.output_dir")))


def uses_optuna(config: DictConfig) -> bool:
    """Return whether Optuna chooses the runs of a sweep."""
    return "optuna" in str(OmegaConf.select(config, "hydra.sweeper._target_")).lower()


def call_command(command: Callable[[], Any]) -> None:
    """Call a command that `hydra.main` decorates. If a sweep ends with an error, write the results of its jobs so far.

    Raises:
        JobFailed: a job on SageMaker or in a container has failed.
    """
    try:
        command()
    except Exception:
        for sweep, config in tuple(_running):
            sweep.on_multirun_end(config)
        raise
    if job_failures:
        raise job_failures[0]


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
    return mask_urls(" ".join(f"{names[_key(override)]}={format_setting(unquote(override))}"
                              for override in overrides if _key(override) in names)) or None


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _keep_quotes(config: DictConfig) -> None:
    """Apply `quote_choices` to what a sweep varies: to the overrides on the command line, and to the search space."""
    space = {key: f"{key}={choices}" for key, choices in _unresolved(config, "hydra.sweeper.params").items()}
    with read_write(config), open_dict(config):
        config.hydra.overrides.task = [quote_choices(word) for word in _unresolved(config, "hydra.overrides.task")]
        for key, choices in space.items():
            if (quoted := quote_choices(choices)) != choices:
                config.hydra.sweeper.params[key] = quoted.partition("=")[2]


def quote_choices(override: str) -> str:
    """Rewrite KEY=choice(...) as KEY=VALUE,VALUE if Hydra's sweepers could not read some of its values without quotes.

    Any other override is returned unchanged. In the list of values, Hydra and the Optuna sweeper keep the quotes.
    """
    parsed = parse(override)
    if parsed is None or parsed.value_type is not ValueType.CHOICE_SWEEP or parsed.input_line is None:
        return override
    texts = choice_texts(parsed)
    if texts == list(parsed.sweep_string_iterator()):
        return override
    return f"{override.partition('=')[0]}={','.join(texts)}"


def _unresolved(config: DictConfig, key: str) -> Any:
    """Return a dictionary or list in `config` as the user typed it: an interpolation may hold only in a job."""
    node = OmegaConf.select(config, key)
    return {} if node is None else OmegaConf.to_container(node, resolve=False)
