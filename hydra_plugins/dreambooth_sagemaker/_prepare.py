"""Checks all jobs of a sweep and builds their requests, before the first job is submitted and paid for."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dreambooth.cloud import secrets
from dreambooth.cloud.job import Job
from dreambooth.cloud.training_job_request import (
    JobSettings,
    build_hyperparameters,
    build_request,
    is_local_uri,
    job_name,
)
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.enums import TrackingKind
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config
from dreambooth.config.storage import S3_SCHEME
from dreambooth.errors import ConfigError
from dreambooth.sweeps.hydra_callbacks import trial_name
from dreambooth.utils.plurals import counted
from hydra_plugins.dreambooth_sagemaker import _inputs
from hydra_plugins.dreambooth_sagemaker._inputs import Inputs

PLANNER_ARGUMENTS = ("-m", "dreambooth.plan", "plan.format=json")


def refuse_secrets(configs: Sequence[DictConfig], sweep: str) -> None:
    """Refuse jobs whose requests would contain credentials.

    Hydra has already stored the overrides in multirun.yaml, possibly with the credentials. If this function refuses a
    job, it deletes multirun.yaml. Call it before all other checks: if another check failed first, the command would
    end, and multirun.yaml would remain.

    Raises:
        ConfigError: a request would contain a value that looks like a credential.
    """
    problems = []
    for config in configs:
        hyperparameters = build_hyperparameters(config.hydra.overrides.task, (), sweep)
        request = build_request(_job_settings(config), "", sweep, hyperparameters, {}, None, None)
        problems += [f"job {config.hydra.job.num}: {problem}" for problem in secrets.find_credentials(request)]
    if problems:
        (Path(str(configs[0].hydra.sweep.dir)) / "multirun.yaml").unlink(missing_ok=True)
        raise ConfigError(*dict.fromkeys(problems))


def prepare_jobs(configs: Sequence[DictConfig], sweep: str, backend: Any, mode: str) -> list[Job]:
    """Check and build all jobs of a sweep, upload their inputs, and return the jobs, which are ready to be submitted.

    Args:
        configs: the composed configuration of each job.
        backend: the object that will submit the jobs, to SageMaker or to Docker.
        mode: hydra.launcher.mode, aws or docker.

    Raises:
        ConfigError: jobs have problems; the message has one line per problem. Nothing was uploaded or submitted.
    """
    problems: list[str] = []
    checked: list[tuple[DictConfig, Config, dict[str, Any]]] = []
    for config in configs:
        try:
            checked.append((config, *_check_job(config, mode)))
        except ConfigError as error:
            problems += [f"job {config.hydra.job.num}: {problem}" for problem in error.problems]
    _raise_if_any(problems)
    inputs = Inputs(mode)
    _raise_if_any([f"job {config.hydra.job.num}: {problem}"
                   for config, run, _ in checked for problem in inputs.find_problems(run)])
    jobs = [_build_job(config, run, plan, sweep, backend, mode, inputs) for config, run, plan in checked]
    _raise_if_any([f"job {job.number}: {problem}" for job in jobs for problem in backend.find_problems(job.request)])
    inputs.upload()
    return [_build_job(config, run, plan, sweep, backend, mode, inputs, submit=True) for config, run, plan in checked]


def task_config(config: DictConfig) -> DictConfig:
    """Return the configuration of a job without the config group hydra."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def describe_jobs(jobs: Sequence[Job], mode: str = "aws") -> Iterator[str]:
    """Yield one line per job with its instances, price and estimated cost, and one line with the total."""
    for job in jobs:
        resources = job.request["ResourceConfig"]
        price = f"${job.usd_hour:.4g}/h" if job.usd_hour is not None else "price unknown" if mode == "aws" else "here"
        cost = "" if job.estimate_usd is None else f", about ${job.estimate_usd:.2f}"
        hours = "" if job.estimate_seconds is None else f" for {job.estimate_seconds / 3600:.1f} h"
        spot = "spot, at most " if job.spot else ""
        yield (f"{job.name}  {resources['InstanceCount']} x {resources['InstanceType']}  {spot}{price}{hours}{cost}  "
               f"{' '.join(job.overrides)}")
    costs = [job.estimate_usd for job in jobs if job.estimate_usd is not None]
    unpriced = sum(job.usd_hour is None for job in jobs) if mode == "aws" else 0
    if costs or unpriced:
        total = f", about ${sum(costs):.2f}" + f" for {len(costs)} of them" * (len(costs) < len(jobs))
        yield (f"{counted(len(jobs), 'job')}{total * bool(costs)}"
               + f"; {unpriced} without a price: type hydra.launcher.price_usd_hour=PRICE" * bool(unpriced)
               + " (estimate: see docs/planner.md)" * bool(costs))


def _raise_if_any(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _check_job(config: DictConfig, mode: str) -> tuple[Config, dict[str, Any]]:
    """Check one job: the launcher's settings, the rules of the run, and whether the run fits in memory.

    Returns:
        The run's configuration, and the output of the planner for the run; {} if the planner did not run.

    Raises:
        ConfigError: the job has problems; the message has one line per problem.
    """
    run, launcher = load(task_config(config)), config.hydra.launcher
    problems = [] if mode == "docker" else [
        f"{setting} is missing: type hydra.launcher.{key}={example}" for key, setting, example in (
            ("role", "the execution role", "arn:aws:iam::ACCOUNT:role/NAME"),
            ("s3", "the S3 folder for results", "s3://BUCKET/FOLDER"),
            ("instance_type", "the instance type", "ml.g4dn.xlarge, or a hardware= that has one")) if not launcher[key]]
    if not launcher.image:
        problems.append("the image is missing: type hydra.launcher.image=ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG")
    if launcher.spot and launcher.keep_alive_minutes:
        problems.append("spot instances have no warm pool: type hydra.launcher.keep_alive_minutes=0, or spot=false")
    if bool(launcher.subnets) != bool(launcher.security_groups):
        problems.append("a VPC needs both: type hydra.launcher.subnets=[...] and hydra.launcher.security_groups=[...]")
    problems += [f"{override} deletes a key, which hyperparameters cannot express: leave it out"
                 for override in config.hydra.overrides.task if override.startswith("~")]
    for key in ("instance_dir", "class_dir"):
        folder = getattr(run.dataset, key)
        if folder and not _inputs.is_portable(folder) and not Path(folder).is_dir():
            problems.append(f"there is no folder {folder}: type dataset.{key}=DIR")
    problems += _inputs.find_local_paths(run)
    address = run.tracking.uri or launcher.mlflow_uri
    tracked = run.tracking.kind is TrackingKind.mlflow
    if mode == "aws" and address and tracked and is_local_uri(address):
        key = "tracking.uri" if run.tracking.uri else "hydra.launcher.mlflow_uri"
        problems.append(f"jobs on AWS cannot reach MLflow at {address}: type {key}=https://SERVER, or {key}=null to "
                        "keep their metrics in their own folders")
    try:
        resolve(_inputs.without_s3_paths(run), Path(run.run_root))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return run, _run_planner(config) if launcher.plan else {}


def _run_planner(config: DictConfig) -> dict[str, Any]:
    """Run the planner in a child process, since it needs torch. Return its output, or {} if torch is not installed.

    Raises:
        ConfigError: the job needs more memory or disk than its instance has, or the planner failed.
    """
    if find_spec("torch") is None:
        print("torch is not installed here: it is not checked whether the jobs fit in memory", flush=True)
        return {}
    overrides = [override for override in config.hydra.overrides.task if S3_SCHEME not in override]
    planner = subprocess.run([sys.executable, *PLANNER_ARGUMENTS, *overrides], capture_output=True, text=True,
                             check=False, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        plan: dict[str, Any] = json.loads(planner.stdout)
    except ValueError:
        plan = {}
    if planner.returncode:
        message = planner.stderr.strip().removeprefix("dreambooth: ") or (
            f"the planner ended with {planner.returncode}")
        raise ConfigError(" ".join(message.split())[:600])
    return plan


def _build_job(config: DictConfig, run: Config, plan: Mapping[str, Any], sweep: str, backend: Any, mode: str,
               inputs: Inputs, submit: bool = False) -> Job:
    """Build a job and its request.

    Args:
        submit: whether the job is about to be submitted. If hydra.launcher.resubmit is also true, a job that has failed
            before gets a new name.
    """
    settings, launcher = _job_settings(config), config.hydra.launcher
    number, overrides = config.hydra.job.num, tuple(config.hydra.overrides.task)
    channels, contents = inputs.channels(run, settings.s3), inputs.contents(run)
    hyperparameters = build_hyperparameters(overrides, channels, sweep, trial_name(list(overrides)),
                                            settings.mlflow_uri if run.tracking.uri is None else None)
    name = first_name = job_name(sweep, number, hyperparameters, contents)
    if submit and launcher.resubmit and mode == "aws":
        attempt = 0
        while backend.has_failed(name):
            attempt += 1
            name = job_name(sweep, number, hyperparameters, contents, attempt)
    request = build_request(settings, name, sweep, hyperparameters, channels, _instance_value(config, "disk_gib"),
                            plan.get("disk_gib"), first_name)
    price = _instance_value(config, "price_usd_hour")
    usd_hour = None if price is None or mode == "docker" else price * settings.instance_count
    seconds = plan.get("run_seconds")
    cost = None if seconds is None or usd_hour is None else seconds / 3600 * usd_hour
    return Job(number, name, overrides, request, run.train.max_train_steps, usd_hour, cost, seconds)


def _job_settings(config: DictConfig) -> JobSettings:
    launcher: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
    return JobSettings(**{item.name: launcher[item.name] for item in fields(JobSettings)} | {
        "subnets": tuple(launcher["subnets"]), "security_groups": tuple(launcher["security_groups"]),
        "role": launcher["role"] or "", "s3": launcher["s3"] or str(Path.cwd()),
        "instance_type": launcher["instance_type"] or "local"})


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
        file_type = OmegaConf.load(file).instance_type
    else:  # the user's own option of the group hardware
        file_type = None if "hardware.instance_type" in typed_keys else config.hardware.instance_type
    typed = not OmegaConf.is_interpolation(launcher, key) or f"hardware.{key}" in typed_keys
    value: float | None = launcher[key] if typed or launcher.instance_type == file_type else None
    return value
