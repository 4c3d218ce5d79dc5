"""Checks and builds the jobs of a sweep from the configurations that Hydra composed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dreambooth.cloud import job_preparation
from dreambooth.cloud.job import Job
from dreambooth.config.launcher import LauncherJob, read_job
from dreambooth.errors import ConfigError
from dreambooth.sweeps.hydra_callbacks import trial_name


def refuse_secrets(configs: Sequence[DictConfig], sweep: str) -> None:
    """Refuse jobs whose requests would contain credentials.

    Hydra has already stored the overrides in multirun.yaml, possibly with the credentials. If this function refuses a
    job, it deletes multirun.yaml. Call it before all other checks: if another check failed first, the command would
    end, and multirun.yaml would remain.

    Raises:
        ConfigError: a request would contain a value that looks like a credential.
    """
    if problems := job_preparation.find_credentials(_read_jobs(configs), sweep):
        (Path(str(configs[0].hydra.sweep.dir)) / "multirun.yaml").unlink(missing_ok=True)
        raise ConfigError(*dict.fromkeys(problems))


def prepare_jobs(configs: Sequence[DictConfig], sweep: str, backend: Any, mode: str) -> list[Job]:
    """Check and build all jobs of a sweep. See `dreambooth.cloud.job_preparation.prepare_jobs`.

    Args:
        configs: the composed configuration of each job.
    """
    return job_preparation.prepare_jobs(_read_jobs(configs), sweep, backend, mode)


def _read_jobs(configs: Sequence[DictConfig]) -> list[LauncherJob]:
    return [read_job(config, trial_name(list(config.hydra.overrides.task))) for config in configs]
