"""Implementation of the launcher: composes all jobs, then runs them in this process, or submits and follows them."""

import math
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from dreambooth.cloud import sweep_results
from dreambooth.cloud.docker_backend import DockerBackend
from dreambooth.cloud.follower import Follower
from dreambooth.cloud.job import COMPLETED, FAILED, PRUNED, STOPPED, Job, JobState, Spending
from dreambooth.cloud.job_preparation import check_numbers, describe_jobs, is_sweep_name, prepare_jobs, read_budget
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.config.launcher import LauncherJob, without_hydra
from dreambooth.errors import ConfigError, DreamBoothError, Interrupted
from dreambooth.runs import pruning
from dreambooth.sweeps import launched_jobs
from dreambooth.sweeps.hydra_callbacks import failure_reasons, job_failures, uses_optuna
from dreambooth.utils.atomic_files import read_object
from dreambooth.utils.masking import mask_file, mask_urls
from dreambooth.utils.plurals import counted
from dreambooth.utils.quoting import override
from hydra_plugins.dreambooth_sagemaker import _prepare
from hydra_plugins.dreambooth_sagemaker._sweep import SweepState

MODES = ("aws", "local", "docker")


class JobFailed(CompactHydraException):
    """A job of the sweep failed. Raised after all jobs have ended; Hydra prints the message and exits with code 1."""


def launch(sweep: SweepState, job_overrides: Sequence[Sequence[str]], first_number: int) -> list[JobReturn]:
    """Run the jobs of one batch. Return one JobReturn per job, in order.

    All jobs are checked before the first job is run. After a DreamBoothError, print one sentence and exit with the exit
    code of the error. After Ctrl-C, print one sentence and exit with the exit code of Interrupted.
    """
    setup_globals()
    assert sweep.config is not None and sweep.hydra_context is not None
    hydra = sweep.config.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    sweep.name = sweep.name or _new_sweep_name(hydra.job.name)
    try:
        configs = [_compose_job(sweep, overrides, first_number + i) for i, overrides in enumerate(job_overrides)]
        composed = [] if sweep.settings["mode"] == "local" else _prepare.read_jobs(configs)
        _prepare.refuse_secrets(composed, sweep.name, Path(str(hydra.sweep.dir)))
        mask_file(Path(str(hydra.sweep.dir)) / "multirun.yaml")
        _check_settings(sweep)
        check_numbers([config.hydra.launcher for config in configs])
        if sweep.settings["mode"] == "local":
            return _run_in_process(sweep, configs, job_overrides, first_number)
        return _run_on_backend(sweep, configs, composed)
    except DreamBoothError as error:
        print(f"dreambooth: {mask_urls(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        when = "" if sweep.settings["mode"] == "local" else " before anything was submitted"
        print(f"dreambooth: interrupted{when}: repeat the command", file=sys.stderr)
        sys.exit(Interrupted.exit_code)


def _new_sweep_name(job: str) -> str:
    word = re.sub(r"[^A-Za-z0-9]+", "-", job).strip("-")[:20].strip("-") or "sweep"
    return f"{word}-{time.strftime('%Y%m%d-%H%M%S')}"


def _compose_job(sweep: SweepState, overrides: Sequence[str], number: int) -> DictConfig:
    assert sweep.hydra_context is not None and sweep.config is not None
    config = sweep.hydra_context.config_loader.load_sweep_config(sweep.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    if OmegaConf.select(config, "tracking.sweep", throw_on_missing=False) is None and "tracking" in config:
        config.tracking.sweep = sweep.name
    return config


def _check_settings(sweep: SweepState) -> None:
    """Check the launcher's settings that are the same for all jobs of a sweep.

    Raises:
        ConfigError: settings are invalid; the message has one line per problem.
    """
    assert sweep.config is not None
    settings = sweep.settings
    rules = {
        f"hydra.launcher.mode must be {', '.join(MODES)}, not {settings['mode']}": settings["mode"] in MODES,
        f"hydra.launcher.on_interrupt must be leave or stop, not {settings['on_interrupt']}":
            settings["on_interrupt"] in ("leave", "stop"),
        f"hydra.launcher.sweep must be 1 to 40 letters, digits and hyphens, not {sweep.name}":
            is_sweep_name(sweep.name or ""),
        f"hydra.launcher.max_parallel must be 1 or more, not {settings['max_parallel']}": settings["max_parallel"] >= 1,
        "this process is itself a job of a sweep, and a job cannot submit jobs: type hydra/launcher=basic":
            settings["mode"] == "local" or "DREAMBOOTH_SWEEP" not in os.environ,
    }
    if problems := [problem for problem, holds in rules.items() if not holds]:
        raise ConfigError(*problems)


# -- jobs in this process -------------------------------------------------------------------------------------------

def _run_in_process(sweep: SweepState, configs: Sequence[DictConfig], job_overrides: Sequence[Sequence[str]],
                    first_number: int) -> list[JobReturn]:
    """Run the jobs one after another in this process, as Hydra's basic launcher does."""
    assert sweep.hydra_context is not None and sweep.task_function is not None and sweep.config is not None
    returns: list[JobReturn] = []
    try:
        for config, overrides in zip(configs, job_overrides, strict=True):
            print(f"#{first_number + len(returns)} : {mask_urls(' '.join(filter_overrides(overrides)))}", flush=True)
            returns.append(run_job(hydra_context=sweep.hydra_context, task_function=sweep.task_function,
                                   config=config, job_dir_key="hydra.sweep.dir",
                                   job_subdir_key="hydra.sweep.subdir"))
            configure_log(sweep.config.hydra.hydra_logging, sweep.config.hydra.verbose)
    finally:  # also after SystemExit, which an interrupted run raises: write the results so far
        if "tracking" in sweep.config:  # the launcher may also run an application other than dreambooth
            jobs = [Job(first_number + i, f"#{first_number + i}", tuple(filter_overrides(overrides)), {}, 0)
                    for i, overrides in enumerate(job_overrides[:len(returns)])]
            states = [_job_state(job_return) for job_return in returns]
            if len(returns) == len(configs):
                _report(sweep, jobs, states, configs[0])
            else:
                _report_partial(sweep, jobs, states)
    return returns


def _job_state(job_return: JobReturn) -> JobState:
    """Return the final state of a job that Hydra ran in this process."""
    if job_return.status is JobStatus.FAILED:
        return JobState(FAILED, reason=str(job_return._return_value))
    folder = Path(str(OmegaConf.select(job_return.hydra_cfg or OmegaConf.create(), "hydra.runtime.output_dir")))
    if (folder / pruning.PRUNED_FILE).is_file():
        return JobState(PRUNED, reason=failure_reasons.get(folder, ""))
    value = job_return.return_value
    result = read_object(folder / "result.json") if isinstance(value, list) else {"objective": value}
    state = sweep_results.fail_without_objective(JobState(COMPLETED, result=result or {}))
    if state.status == FAILED:
        state.reason = failure_reasons.get(folder, sweep_results.SEE_OUTPUT)
    return state


# -- jobs on SageMaker or in containers -----------------------------------------------------------------------------

def _run_on_backend(sweep: SweepState, configs: Sequence[DictConfig],
                    composed: Sequence[LauncherJob]) -> list[JobReturn]:
    """Submit the jobs, follow them to their end, and report the results.

    Args:
        configs: the configuration of each job.
        composed: the same jobs, as `_prepare.read_jobs` returned them.
    """
    assert sweep.config is not None and sweep.name is not None
    settings, folder = sweep.settings, Path(str(sweep.config.hydra.sweep.dir))
    max_parallel = settings["max_parallel"]
    backend: DockerBackend | SageMakerBackend
    if settings["mode"] == "docker":
        backend = DockerBackend(folder / "jobs", resubmit=settings["resubmit"])
        max_parallel = backend.limit_parallel(max_parallel)
    else:
        backend = SageMakerBackend()
    budget = read_budget(composed)

    def check_budget(jobs: Sequence[Job]) -> None:
        spending = sweep.spending or Spending(budget, *launched_jobs.spent({job.name for job in jobs}))
        spending.check(sweep_results.jobs_to_run(jobs, sweep.done))

    search = launched_jobs.study_jobs.search
    all_jobs = prepare_jobs(composed, sweep.name, backend, settings["mode"], check_budget, search)
    spending = sweep.spending = sweep.spending or Spending(
        budget, *launched_jobs.spent({job.name for job in all_jobs}))
    jobs = sweep_results.jobs_to_run(all_jobs, sweep.done)
    print("\n".join(describe_jobs(jobs, settings["mode"])), flush=True)
    # A study of Optuna keeps the name of its jobs.
    again = "" if uses_optuna(sweep.config) else f" with {override('hydra.launcher.sweep', sweep.name)}"
    follow_hint = f"the same command{again} follows these jobs again"
    if not sweep.table:  # printed once, not for every batch
        print(follow_hint, flush=True)
        if max_parallel < settings["max_parallel"] and len(jobs) > 1:
            print("one job at a time: each uses all GPUs of this machine", flush=True)
    follower = Follower(backend, jobs, max_parallel=max_parallel, poll_seconds=settings["poll_seconds"],
                        stop_on_interrupt=settings["on_interrupt"] == "stop", follow_hint=follow_hint,
                        spending=spending if spending.budget.limits else None,
                        search=search)
    try:
        states = [sweep_results.fail_without_objective(state) for state in follower.run()]
    except DreamBoothError:
        _report_partial(sweep, jobs, [sweep_results.fail_without_objective(state) for state in follower.states])
        raise
    finally:
        launched_jobs.study_jobs.costs |= {
            job.name: (state.cost_usd(job) or 0.0, max(state.seconds, state.billed_seconds or 0.0) / 3600)
            for job, state in zip(jobs, follower.states, strict=True)}
    spending.add(jobs, states)
    all_jobs, states = sweep_results.share_results(all_jobs, jobs, states, sweep.done)
    try:
        _report(sweep, all_jobs, states, configs[0])
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted while results were written; all jobs have ended: {follow_hint}") from None
    stopped = sum(state.status == STOPPED for state in states)
    if follower.over_budget and stopped:
        again = "" if uses_optuna(sweep.config) else f" {override('hydra.launcher.sweep', sweep.name)}"
        raise Interrupted(f"{follower.over_budget}: {counted(stopped, 'job')} of {len(states)} stopped or not started, "
                          f"and the results of the others are kept; to continue, repeat the command with a higher "
                          f"budget and{again} hydra.launcher.resubmit=true")
    return [_job_return(config, job, state) for config, job, state in zip(configs, all_jobs, states, strict=True)]


def _job_return(config: DictConfig, job: Job, state: JobState) -> JobReturn:
    """Build the JobReturn that a sweeper reads. It holds the job's objective, or an exception if the job failed."""
    completed = state.status in (COMPLETED, PRUNED)
    job_return = JobReturn(
        overrides=list(job.overrides), cfg=without_hydra(config),
        hydra_cfg=OmegaConf.masked_copy(config, ["hydra"]), task_name=config.hydra.job.name,
        working_dir=str(config.hydra.sweep.dir), status=JobStatus.COMPLETED if completed else JobStatus.FAILED)
    job_return.return_value = math.nan if state.status == PRUNED else sweep_results.returned_value(
        state) if completed else JobFailed(f"dreambooth: job {job.name} {state.status.lower()}: {state.reason}")
    if state.status == STOPPED or state.result.get("unread"):  # a repeated command may still get the result
        launched_jobs.study_jobs.stopped[job.number] = f"job {job.name}: {state.reason}"
    if state.status == PRUNED:
        launched_jobs.study_jobs.pruned.add(job.number)
    if not completed:  # Optuna goes on, and the command must not end with exit code 0
        job_failures.append(job_return._return_value)
    return job_return


# -- results --------------------------------------------------------------------------------------------------------

def _report(sweep: SweepState, jobs: Sequence[Job], states: Sequence[JobState], config: DictConfig) -> None:
    """Print the results of a batch, and store the results of all batches so far.

    The results are stored in the CSV file of the sweep, and on the MLflow server that the jobs use.
    """
    assert sweep.name is not None
    sweep.table += sweep_results.result_rows(jobs, states)
    path = sweep_results.write_table(Path(str(config.hydra.sweep.dir)), sweep.name, sweep.table)
    for row in sweep.table[-len(jobs):]:
        outcome = f"{row['objective']:.4f}" if row["objective"] is not None else row["reason"]
        cost = "" if row["billed_usd"] is None else f"  ${row['billed_usd']:.2f}"
        print(f"{row['job']}  {row['status']}  {outcome}{cost}")
    commands = sweep_results.next_commands(sweep.name, path.parent, sweep.table) * (sweep.settings["mode"] == "local")
    print("\n".join([*sweep_results.describe_front(sweep.table), f"sweep {sweep.name}: {path}", *commands]), flush=True)
    tracking, local = config.tracking, sweep.settings["mode"] == "local"
    uri = tracking.uri or (None if local else config.hydra.launcher.mlflow_uri)
    plot = sweep_results.write_parallel_coordinates(path.parent, sweep.name, sweep_results.parallel_axes(sweep.table))
    sweep_results.log_sweep(path, sweep.name, sweep.table, tracking.kind.value, uri, tracking.experiment,
                            Path(config.run_root), plot, local=local)


def _report_partial(sweep: SweepState, jobs: Sequence[Job], states: Sequence[JobState]) -> None:
    """Write a CSV file with the results of all jobs that have ended. Called if the command ends early.

    Log nothing to MLflow, because the MLflow run of a sweep describes all of its jobs.
    """
    assert sweep.config is not None and sweep.name is not None
    ended = [number for number, state in enumerate(states) if state.ended]
    with suppress(KeyboardInterrupt):
        rows = sweep.table + sweep_results.result_rows([jobs[number] for number in ended],
                                                       [states[number] for number in ended])
        folder = Path(str(sweep.config.hydra.sweep.dir))
        if path := sweep_results.write_partial_table(folder, sweep.name, rows):
            print(f"sweep {sweep.name}: {counted(len(rows), 'job')} ended: {path}", flush=True)
