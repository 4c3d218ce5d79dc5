"""Implementation of the launcher: submits the jobs of a batch as one job array, and follows it to its end."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dreambooth.config.launcher import without_hydra
from dreambooth.errors import DreamBoothError, Interrupted, UserError
from dreambooth.schedulers import slurm_array
from dreambooth.sweeps import launched_jobs
from dreambooth.sweeps.hydra_callbacks import default_sweep_id, failure_reasons, job_failures, trial_name
from dreambooth.utils.masking import mask_urls
from dreambooth.utils.plurals import counted
from dreambooth.utils.quoting import hydra_string


def launch(settings: Mapping[str, Any], config: DictConfig, context: HydraContext,
           job_overrides: Sequence[Sequence[str]], first_number: int) -> list[JobReturn]:
    """Run the jobs of one batch. Return one JobReturn per job, in order.

    A failed job does not end the sweep: its objective is NaN, and the command ends with its exit code after the sweep.
    After a DreamBoothError, print one sentence and exit with the exit code of the error. After Ctrl-C, cancel the job
    array, print one sentence and exit with the exit code of Interrupted.
    """
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    try:
        composed = [_compose_job(config, context, overrides, first_number + i)
                    for i, overrides in enumerate(job_overrides)]
        ends = _run(settings, config, composed, job_overrides, first_number)
    except DreamBoothError as error:
        print(f"dreambooth: {mask_urls(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    returns = [_job_return(job, overrides, end)
               for job, overrides, end in zip(composed, job_overrides, ends, strict=True)]
    for job, result in zip(composed, returns, strict=True):
        context.callbacks.on_job_end(config=job, job_return=result)
    return returns


def _compose_job(config: DictConfig, context: HydraContext, overrides: Sequence[str], number: int) -> DictConfig:
    """Compose a job's configuration, and set its number and the folder of its run."""
    job = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.id = job.hydra.job.num = number
    with read_write(job.hydra.runtime), open_dict(job.hydra.runtime):
        job.hydra.runtime.output_dir = str(Path(str(job.hydra.sweep.dir), str(job.hydra.sweep.subdir)).absolute())
    return job


def _run(settings: Mapping[str, Any], config: DictConfig, composed: Sequence[DictConfig],
         job_overrides: Sequence[Sequence[str]], first_number: int) -> list[slurm_array.End]:
    """Submit the jobs, unless an earlier command has, follow them, and return how they ended."""
    tracking = OmegaConf.select(config, "tracking.sweep", throw_on_missing=False) if "tracking" in config else None
    sweep = str(tracking or default_sweep_id())
    folder = Path(str(config.hydra.sweep.dir), f"slurm-{sweep}", str(first_number)).absolute()
    jobs = [slurm_array.Task(_command(job, overrides, sweep), Path(str(job.hydra.runtime.output_dir)))
            for job, overrides in zip(composed, job_overrides, strict=True)]
    if found := slurm_array.find_active(jobs, Path(str(config.hydra.sweep.dir)).absolute(),
                                           settings["poll_seconds"]):
        array, folder = found
        print(f"Slurm job {array} of an earlier command has these runs, and is followed", flush=True)
    else:
        array = slurm_array.submit(jobs, settings, folder)
    print(f"Slurm job {array}: {counted(len(jobs), 'job')}, logs in {folder}", flush=True)
    for number, overrides in enumerate(job_overrides, first_number):
        print(f"#{number} : {mask_urls(' '.join(filter_overrides(overrides)))}", flush=True)
    try:
        return slurm_array.follow(array, jobs, folder, settings["poll_seconds"])
    except KeyboardInterrupt:
        slurm_array.cancel(array, folder)
        raise Interrupted(f"interrupted; the Slurm job {array} is cancelled, and its runs save their state: repeat the "
                          "command to continue") from None


def _command(job: DictConfig, overrides: Sequence[str], sweep: str) -> list[str]:
    """Return the overrides of a job's command: those of the sweep, its run folder, and the names of trial and sweep."""
    hydra: Any = OmegaConf.to_container(job.hydra.sweep, resolve=False)
    words = [f"hydra.run.dir={hydra['dir']}/{hydra['subdir']}", f"tracking.sweep={hydra_string(sweep)}"]
    if name := trial_name(list(overrides)):
        words.append(f"tracking.run_name={hydra_string(name)}")
    return [*words, *filter_overrides(overrides)]


def _job_return(job: DictConfig, overrides: Sequence[str], end: slurm_array.End) -> JobReturn:
    """Build the JobReturn that a sweeper reads, and record the reason if the job failed."""
    result = JobReturn(
        overrides=list(overrides), cfg=without_hydra(job), hydra_cfg=OmegaConf.masked_copy(job, ["hydra"]),
        task_name=job.hydra.job.name, working_dir=str(Path.cwd()), status=JobStatus.COMPLETED)
    result.return_value = math.nan if end.objective is None else end.objective
    if end.objective is None:
        failure_reasons[Path(str(job.hydra.runtime.output_dir))] = end.reason
        if end.code == Interrupted.exit_code:
            launched_jobs.study_jobs.stopped[job.hydra.job.num] = end.reason
        error = UserError(end.reason)
        error.exit_code = end.code
        job_failures.append(error)
    return result
