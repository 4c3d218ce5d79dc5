"""Reads the jobs of the SageMaker launcher from the configuration that Hydra composed, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dreambooth.config.compose import composed, conf_dir, load
from dreambooth.config.schema import Config, RunBudget
from dreambooth.errors import ConfigError


@dataclass(frozen=True)
class LauncherJob:
    """One job of a sweep, as Hydra composed it."""

    number: int  # position in the sweep
    overrides: tuple[str, ...]  # as the user typed them, without overrides of Hydra's own settings and of the budget
    launcher: Mapping[str, Any]  # settings in conf/hydra/launcher/sagemaker.yaml
    price_usd_hour: float | None  # on-demand price per hour of one instance of the job; None: unknown
    disk_gib: float | None  # size of the instance's own disk; None: it has none, or the size is unknown
    run_name: str | None  # name of the run in MLflow; None: its default
    _config: DictConfig = field(repr=False)

    @property
    def spot_price_usd_hour(self) -> float | None:
        """The price per hour of a spot instance that the user has typed; None: unknown."""
        price: float | None = self._config.hardware.spot_price_usd_hour
        return price

    @property
    def budget(self) -> RunBudget:
        """The budget, which is that of the whole sweep.

        Raises:
            ConfigError: a limit is not valid.
        """
        try:
            return RunBudget(**OmegaConf.to_container(self._config.budget))  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(*str(error).splitlines()) from None

    def load_run(self) -> Config:
        """Return the configuration of the job's run, which has no budget of its own.

        Raises:
            ConfigError: as `config.compose.load`.
        """
        config = load(without_hydra(self._config))
        config.budget = RunBudget()
        return config


def read_job(config: DictConfig, run_name: str | None = None) -> LauncherJob:
    """Return one job of a sweep.

    Args:
        config: the configuration of the job, with the config group hydra.
        run_name: name of the run in MLflow; None: its default.
    """
    launcher: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
    overrides = tuple(word for word in config.hydra.overrides.task if not word.lstrip("+").startswith("budget."))
    return LauncherJob(config.hydra.job.num, overrides, launcher, _instance_value(config, "price_usd_hour"),
                       _instance_value(config, "disk_gib"), run_name, config)


def compose_job(overrides: Sequence[str], number: int = 0) -> LauncherJob:
    """Compose one job of the launcher from overrides, as the command `train -m hydra/launcher=sagemaker` does.

    Raises:
        UserError: Hydra cannot compose the overrides.
    """
    with composed(overrides, "hydra/launcher=sagemaker") as config:
        with open_dict(config):
            config.hydra.job.num = number
        return read_job(config)


def without_hydra(config: DictConfig) -> DictConfig:
    """Return the configuration of a job without the config group hydra."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _instance_value(config: DictConfig, key: str) -> float | None:
    """Return the price or the disk size of a job's instance, or None if it is not known.

    If the user has set the value, return it. Otherwise return the value in the hardware file, conf/hardware/NAME.yaml,
    if this file names the same instance type as the job.

    Args:
        key: price_usd_hour or disk_gib.
    """
    launcher = config.hydra.launcher
    typed_keys = {override.lstrip("+").partition("=")[0] for override in config.hydra.overrides.task}
    file = conf_dir() / "hardware" / f"{config.hydra.runtime.choices.get('hardware')}.yaml"
    if file.is_file():
        file_type = _read_instance_type(file)
    else:  # the user's own option of the group hardware
        file_type = None if "hardware.instance_type" in typed_keys else config.hardware.instance_type
    typed = not OmegaConf.is_interpolation(launcher, key) or f"hardware.{key}" in typed_keys
    value: float | None = launcher[key] if typed or launcher.instance_type == file_type else None
    return value


@cache
def _read_instance_type(file: Path) -> str | None:
    """Return the instance type in a hardware file. Each file is read once, because all jobs of a sweep need it."""
    found: str | None = OmegaConf.load(file).instance_type
    return found
