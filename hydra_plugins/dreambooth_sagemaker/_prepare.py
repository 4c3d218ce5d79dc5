"""Reads the jobs of a sweep from the configurations that Hydra composed, and refuses jobs with credentials."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from dreambooth.cloud import job_preparation
from dreambooth.config.launcher import LauncherJob, read_job
from dreambooth.errors import ConfigError
from dreambooth.sweeps.hydra_callbacks import trial_name


def read_jobs(configs: Sequence[DictConfig]) -> list[LauncherJob]:
    """Return the jobs of a sweep.

    Args:
        configs: the composed configuration of each job.
    """
    return [read_job(config, trial_name(list(config.hydra.overrides.task))) for config in configs]


def refuse_secrets(composed: Sequence[LauncherJob], sweep: str, folder: Path) -> None:
    """Refuse jobs whose requests would contain credentials.

    Hydra has already stored the overrides in multirun.yaml, possibly with the credentials. If this function refuses a
    job, it deletes multirun.yaml. Call it before all other checks: if another check failed first, the command would
    end, and multirun.yaml would remain.

    Args:
        folder: the folder of the sweep, which contains multirun.yaml.

    Raises:
        ConfigError: a request would contain a value that looks like a credential.
    """
    if problems := job_preparation.find_credentials(composed, sweep):
        (folder / "multirun.yaml").unlink(missing_ok=True)
        raise ConfigError(*dict.fromkeys(problems))
