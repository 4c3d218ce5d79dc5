"""What the launcher does: compose every job, then run them here (mode=local), or check them all and follow them."""

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
from dreambooth.cloud.docker_backend import Containers
from dreambooth.cloud.follower import Follower
from dreambooth.cloud.job import COMPLETED, FAILED, Job, Seen
from dreambooth.cloud.sagemaker_backend import TrainingJobs
from dreambooth.errors import ConfigError, DreamBoothError, Interrupted
from hydra_plugins.dreambooth_sagemaker import _prepare
from hydra_plugins.dreambooth_sagemaker._sweep import Sweep

MODES = ("aws", "local", "docker")
NUMBERS = (("poll_seconds", 1, 3600), ("instance_count", 1, 100), ("max_run_hours", 0.1, 672),
           ("max_wait_hours", 0.1, 8760))  # at least, at most: SageMaker runs a job for 28 days


class JobFailed(CompactHydraException):
    """A job of a sweep, after all others have ended. Hydra prints the sentence and ends with 1."""


def launch(sweep: Sweep, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """One JobReturn a job, in order; what is wrong before anything runs ends the command with one sentence."""
    setup_globals()
    assert sweep.config is not None and sweep.hydra_context is not None
    hydra = sweep.config.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    sweep.name = sweep.name or _new_name(hydra.job.name)
    try:
        configs = [_composed(sweep, overrides, first + i) for i, overrides in enumerate(job_overrides)]
        if sweep.settings["mode"] != "local":
            _prepare.refuse_secrets(configs, sweep.name)
        _check(sweep)
        _check_numbers(configs)
        if sweep.settings["mode"] == "local":
            return _here(sweep, configs, job_overrides, first)
        return _away(sweep, configs, first)
    except DreamBoothError as error:
        print(f"dreambooth: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        when = "" if sweep.settings["mode"] == "local" else " before anything was submitted"
        print(f"dreambooth: interrupted{when}: repeat the command", file=sys.stderr)
        sys.exit(Interrupted.exit_code)


def _new_name(job: str) -> str:
    word = re.sub(r"[^A-Za-z0-9]+", "-", job).strip("-")[:20].strip("-") or "sweep"
    return f"{word}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check(sweep: Sweep) -> None:
    settings = sweep.settings
    rules = {
        f"hydra.launcher.mode must be {', '.join(MODES)}, not {settings['mode']}": settings["mode"] in MODES,
        f"hydra.launcher.on_interrupt must be leave or stop, not {settings['on_interrupt']}":
            settings["on_interrupt"] in ("leave", "stop"),
        f"hydra.launcher.sweep must be 1 to 40 letters, digits and hyphens, not {sweep.name}":
            re.fullmatch(r"[A-Za-z0-9](-*[A-Za-z0-9]){0,39}", sweep.name or "") is not None,
        f"hydra.launcher.max_parallel must be 1 or more, not {settings['max_parallel']}": settings["max_parallel"] >= 1,
        "this is a job of a sweep already, and a job submits none: type hydra/launcher=basic":
            settings["mode"] == "local" or "DREAMBOOTH_SWEEP" not in os.environ,
        "an Optuna study lives in memory and its trials cannot be followed again: leave hydra.launcher.sweep out":
            settings.get("sweep") is None or not _optuna(sweep) or _stored(sweep),
    }
    if broken := [sentence for sentence, holds in rules.items() if not holds]:
        raise ConfigError(*broken)


def _check_numbers(configs: Sequence[DictConfig]) -> None:
    """Of each job, because a sweep may vary them; what SageMaker itself limits is checked with the request."""
    broken = []
    for config in configs:
        asked = config.hydra.launcher
        for key, least, most in NUMBERS:
            if not least <= asked[key] <= most:  # neither holds of NaN
                broken.append(f"hydra.launcher.{key} must be from {least} to {most}, not {asked[key]}")
    if broken:
        raise ConfigError(*dict.fromkeys(broken))


def _optuna(sweep: Sweep) -> bool:
    assert sweep.config is not None
    return "optuna" in str(sweep.config.hydra.sweeper.get("_target_", "")).lower()


def _stored(sweep: Sweep) -> bool:
    assert sweep.config is not None
    return bool(sweep.config.hydra.sweeper.get("storage"))


def _composed(sweep: Sweep, overrides: Sequence[str], number: int) -> DictConfig:
    assert sweep.hydra_context is not None and sweep.config is not None
    config = sweep.hydra_context.config_loader.load_sweep_config(sweep.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    if OmegaConf.select(config, "tracking.sweep", throw_on_missing=False) is None and "tracking" in config:
        config.tracking.sweep = sweep.name
    return config


# -- here -----------------------------------------------------------------------------------------------------------

def _here(sweep: Sweep, configs: Sequence[DictConfig], job_overrides: Sequence[Sequence[str]],
          first: int) -> list[JobReturn]:
    """One after the other in this process, as Hydra's own launcher does."""
    assert sweep.hydra_context is not None and sweep.task_function is not None and sweep.config is not None
    ran: list[JobReturn] = []
    try:
        for config, overrides in zip(configs, job_overrides, strict=True):
            print(f"#{first + len(ran)} : {' '.join(filter_overrides(overrides))}", flush=True)
            ran.append(run_job(hydra_context=sweep.hydra_context, task_function=sweep.task_function,
                               config=config, job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir"))
            configure_log(sweep.config.hydra.hydra_logging, sweep.config.hydra.verbose)
    finally:  # also when a run was interrupted, whose door ends the process
        if "tracking" in sweep.config:  # a sweep of ours, not of another application
            jobs = [Job(first + i, f"#{first + i}", tuple(filter_overrides(overrides)), {}, 0)
                    for i, overrides in enumerate(job_overrides[:len(ran)])]
            ends = [_seen(one) for one in ran]
            if len(ran) == len(configs):
                _report(sweep, jobs, ends, configs[0])
            else:
                _report_some(sweep, jobs, ends)
    return ran


def _seen(ran: JobReturn) -> Seen:
    if ran.status is JobStatus.FAILED:
        return Seen(FAILED, reason=str(ran._return_value))
    seen = sweep_results.settled(Seen(COMPLETED, result={"objective": ran.return_value}))
    if seen.status == FAILED:
        seen.reason = "the run said why"
    return seen


# -- away -----------------------------------------------------------------------------------------------------------

def _away(sweep: Sweep, configs: Sequence[DictConfig], first: int) -> list[JobReturn]:
    assert sweep.config is not None and sweep.name is not None
    settings, folder = sweep.settings, Path(str(sweep.config.hydra.sweep.dir))
    most = settings["max_parallel"]
    backend: Containers | TrainingJobs
    if settings["mode"] == "docker":
        backend = Containers(folder / "jobs", resubmit=settings["resubmit"])
        most = backend.at_once(most)
    else:
        backend = TrainingJobs()
    asked = _prepare.prepared(configs, sweep.name, backend, settings["mode"])
    jobs = sweep_results.unlike(asked, sweep.done)
    print("\n".join(_prepare.announced(jobs, settings["mode"])), flush=True)
    again = ("Optuna asks for other points the next time, so no command follows these jobs again" if _optuna(sweep)
             else f"the same command with hydra.launcher.sweep={sweep.name} follows these jobs again")
    if not sweep.table:  # once, not with every batch
        print(again, flush=True)
        if most < settings["max_parallel"] and len(jobs) > 1:
            print("one job at a time: each takes all cards of this machine", flush=True)
    follower = Follower(backend, jobs, max_parallel=most, poll_seconds=settings["poll_seconds"],
                        stop_on_interrupt=settings["on_interrupt"] == "stop", again=again)
    try:
        ends = [sweep_results.settled(seen) for seen in follower.run()]
    except DreamBoothError:
        _report_some(sweep, jobs, [sweep_results.settled(seen) for seen in follower.seen])
        raise
    jobs, ends = sweep_results.shared(asked, jobs, ends, sweep.done)
    try:
        _report(sweep, jobs, ends, configs[0])
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted while results were written; all jobs have ended: {again}") from None
    return [_returned(config, job, seen) for config, job, seen in zip(configs, jobs, ends, strict=True)]


def _returned(config: DictConfig, job: Job, seen: Seen) -> JobReturn:
    """What a sweeper reads: the objective, or the exception of a job that failed."""
    done = seen.status == COMPLETED
    ran = JobReturn(
        overrides=list(job.overrides), cfg=_prepare.task(config), hydra_cfg=OmegaConf.masked_copy(config, ["hydra"]),
        task_name=config.hydra.job.name, working_dir=str(config.hydra.sweep.dir),
        status=JobStatus.COMPLETED if done else JobStatus.FAILED)
    ran.return_value = sweep_results.objective(seen) if done else JobFailed(
        f"dreambooth: job {job.name} {seen.status.lower()}: {seen.reason}")
    return ran


def _report(sweep: Sweep, jobs: Sequence[Job], ends: Sequence[Seen], config: DictConfig) -> None:
    """Table, CSV and MLflow, with what earlier batches of the same sweep gave. MLflow is the one that the jobs tell."""
    assert sweep.name is not None
    sweep.table += sweep_results.rows(jobs, ends)
    path = sweep_results.write(Path(str(config.hydra.sweep.dir)), sweep.name, sweep.table)
    for row in sweep.table[-len(jobs):]:
        told = f"{row['objective']:.4f}" if row["objective"] is not None else row["reason"]
        cost = "" if row["billed_usd"] is None else f"  ${row['billed_usd']:.2f}"
        print(f"{row['job']}  {row['status']}  {told}{cost}")
    print(f"sweep {sweep.name}: {path}", flush=True)
    tracking, here = config.tracking, sweep.settings["mode"] == "local"
    uri = tracking.uri or (None if here else config.hydra.launcher.mlflow_uri)
    drawn = sweep_results.draw(path.parent, sweep.name, sweep_results.axes(sweep.table))
    sweep_results.track(path, sweep.name, sweep.table, tracking.kind.value, uri, tracking.experiment,
                  Path(config.run_root), drawn, here=here)


def _report_some(sweep: Sweep, jobs: Sequence[Job], ends: Sequence[Seen]) -> None:
    """What has ended when the command ends early, in the CSV alone: MLflow's run of a sweep is of all of it."""
    assert sweep.config is not None and sweep.name is not None
    done = [number for number, seen in enumerate(ends) if seen.ended]
    with suppress(KeyboardInterrupt):
        rows = sweep.table + sweep_results.rows([jobs[number] for number in done], [ends[number] for number in done])
        if path := sweep_results.write_some(Path(str(sweep.config.hydra.sweep.dir)), sweep.name, rows):
            print(f"sweep {sweep.name}: {len(rows)} have ended: {path}", flush=True)
