"""Checks all jobs of a sweep and builds their requests, before the first job is submitted and paid for.

The launcher and `dreambooth.cloud.model_trainer` get their requests here.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dreambooth.cloud import job_inputs, sdk_defaults, secrets
from dreambooth.cloud.job import Job, Search, Spending
from dreambooth.cloud.job_inputs import Inputs
from dreambooth.cloud.training_job_request import (
    JobSettings,
    build_hyperparameters,
    build_request,
    find_deletions,
    is_local_uri,
    job_name,
)
from dreambooth.config.hardware import RunBudget
from dreambooth.config.launcher import LauncherJob
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config
from dreambooth.config.storage import S3_SCHEME
from dreambooth.errors import ConfigError
from dreambooth.utils.masking import mask_urls
from dreambooth.utils.plurals import counted

PLANNER_ARGUMENTS = ("-m", "dreambooth.plan", "plan.format=json")
WITHOUT_EFFECT_ON_PLAN = frozenset({  # settings with which memory, time and price stay the same
    "name", "tracking.sweep", "train.seed", "train.learning_rate", "train.lr_scheduler", "train.lr_warmup_steps",
    "train.ema_decay", "prior.prior_loss_weight", "method.alpha", "optimizer.beta1", "optimizer.beta2", "optimizer.eps",
    "optimizer.weight_decay"})
_plans: dict[tuple[str, ...], tuple[Mapping[str, Any], str]] = {}  # overrides -> plan, and why it is refused, or ""
NUMBER_RANGES = (("poll_seconds", 1, 3600), ("instance_count", 1, 100), ("max_run_hours", 0.1, 672),
                 ("max_wait_hours", 0.1, 8760))  # key, minimum, maximum; SageMaker runs a job for at most 28 days


def check_numbers(launchers: Sequence[Mapping[str, Any]]) -> None:
    """Check the launcher's numeric settings for every job, because a sweep may vary them.

    SageMaker's own limits are not checked here, but later, when the request of each job has been built.

    Raises:
        ConfigError: numbers are out of range; the message has one line per problem.
    """
    _raise_if_any([f"hydra.launcher.{key} must be from {least} to {greatest}, not {settings[key]}"
                   for settings in launchers for key, least, greatest in NUMBER_RANGES
                   if not least <= settings[key] <= greatest])  # also refuses NaN


def is_sweep_name(name: str) -> bool:
    """Return whether a text can be the name of a sweep, from which the names of its jobs are made."""
    return re.fullmatch(r"[A-Za-z0-9](-*[A-Za-z0-9]){0,39}", name) is not None


def find_credentials(composed: Sequence[LauncherJob], sweep: str) -> list[str]:
    """Return one sentence for each value in the requests of jobs that looks like a credential.

    Call it before all other checks, so that no other error leaves a credential in a file that Hydra has written.
    """
    problems = []
    for job in composed:
        hyperparameters = build_hyperparameters(job.overrides, (), sweep)
        request = build_request(_job_settings(job), "", sweep, hyperparameters, {}, None, None)
        problems += [f"job {job.number}: {problem}" for problem in secrets.find_credentials(request)]
    return problems


def read_budget(composed: Sequence[LauncherJob]) -> RunBudget:
    """Return the budget of a sweep.

    Raises:
        ConfigError: a limit is not valid, or the sweep varies the budget.
    """
    budgets = [job.budget for job in composed]
    if any(budget != budgets[0] for budget in budgets):
        raise ConfigError("the budget is that of all jobs of the sweep together, and cannot vary between them: type "
                          "one value for each key of budget")
    return budgets[0] if budgets else RunBudget()


def prepare_jobs(composed: Sequence[LauncherJob], sweep: str, backend: Any, mode: str,
                 check: Callable[[list[Job]], None] | None = None, search: Search | None = None) -> list[Job]:
    """Check and build all jobs of a sweep, upload their inputs, and return the jobs, which are ready to be submitted.

    Args:
        composed: the jobs, as Hydra composed them.
        backend: the object that will submit the jobs, to SageMaker or to Docker.
        mode: hydra.launcher.mode, aws or docker.
        check: called with the jobs before anything is uploaded; raises if they pass the budget. None: check the budget
            of these jobs alone.
        search: knows which jobs it has ended early; these are never submitted again. None: none.

    Raises:
        ConfigError: jobs have problems; the message has one line per problem. Nothing was uploaded or submitted.
        DoesNotFit: the jobs pass the budget. Nothing was uploaded or submitted.
    """
    problems: list[str] = []
    checked: list[tuple[LauncherJob, Config, Mapping[str, Any]]] = []
    defaults = sdk_defaults.read() if mode == "aws" else {}
    for job in composed:
        try:
            checked.append((job, *_check_job(job, mode, defaults)))
        except ConfigError as error:
            problems += [f"job {job.number}: {problem}" for problem in error.problems]
    _raise_if_any(problems)
    inputs = Inputs(mode)
    _raise_if_any([f"job {job.number}: {problem}" for job, run, _ in checked for problem in inputs.find_problems(run)])
    jobs = [_build_job(*item, sweep, backend, mode, inputs, defaults) for item in checked]
    _raise_if_any([f"job {job.number}: {problem}" for job in jobs for problem in (
        *backend.find_problems(job.request), *(secrets.find_credentials(job.request) if job.defaults else ()))])
    (check or Spending(read_budget(composed)).check)(jobs)
    inputs.upload()
    return [_build_job(*item, sweep, backend, mode, inputs, defaults,
                       submit=search is None or not search.is_pruned(item[0].number)) for item in checked]


def describe_jobs(jobs: Sequence[Job], mode: str = "aws") -> Iterator[str]:
    """Yield one line per job with its instances, price and estimated cost, and one line with the total.

    Before these lines, yield what the defaults files of the SageMaker SDK add to the requests. User info and queries of
    URLs are masked.
    """
    yield from map(mask_urls, dict.fromkeys(line for job in jobs for line in job.defaults))
    for job in jobs:
        resources = job.request["ResourceConfig"]
        price = f"${job.usd_hour:.4g}/h" if job.usd_hour is not None else "price unknown" if mode == "aws" else "here"
        cost = "" if job.estimate_usd is None else f", about ${job.estimate_usd:.2f}"
        hours = "" if job.estimate_seconds is None else f" for {job.estimate_seconds / 3600:.1f} h"
        spot = "spot, at most " if job.spot else ""
        if job.spot_usd_hour is not None:
            spot, price = "spot, ", f"${job.spot_usd_hour:.4g}/h"
        yield (f"{job.name}  {resources['InstanceCount']} x {resources['InstanceType']}  {spot}{price}{hours}{cost}  "
               f"{mask_urls(' '.join(job.overrides))}")
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


def _check_job(job: LauncherJob, mode: str, defaults: Mapping[str, Any]) -> tuple[Config, Mapping[str, Any]]:
    """Check one job: the launcher's settings, the rules of the run, and whether the run fits in memory.

    Args:
        defaults: the SageMaker SDK's defaults, which may contain a role.

    Returns:
        The run's configuration, and the output of the planner for the run; {} if the planner did not run.

    Raises:
        ConfigError: the job has problems; the message has one line per problem.
    """
    run, launcher = job.load_run(), job.launcher
    problems = [] if mode == "docker" else [
        f"{setting} is missing: type hydra.launcher.{key}={example}" for key, setting, example in (
            ("role", "the execution role", "arn:aws:iam::ACCOUNT:role/NAME"),
            ("s3", "the S3 folder for results", "s3://BUCKET/FOLDER"),
            ("instance_type", "the instance type", "ml.g4dn.xlarge, or a hardware= that has one"))
        if not launcher[key] and not (key == "role" and "RoleArn" in defaults)]
    if not launcher["image"]:
        problems.append("the image is missing: type hydra.launcher.image=ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG")
    if launcher["spot"] and launcher["keep_alive_minutes"]:
        problems.append("spot instances have no warm pool: type hydra.launcher.keep_alive_minutes=0, or spot=false")
    if bool(launcher["subnets"]) != bool(launcher["security_groups"]):
        problems.append("a VPC needs both: type hydra.launcher.subnets=[...] and hydra.launcher.security_groups=[...]")
    problems += find_deletions(job.overrides)
    for key in ("instance_dir", "class_dir"):
        folder = getattr(run.dataset, key)
        if folder and not job_inputs.is_portable(folder) and not Path(folder).is_dir():
            problems.append(f"there is no folder {folder}: type dataset.{key}=DIR")
    problems += job_inputs.find_local_paths(run)
    address = run.tracking.uri or launcher["mlflow_uri"]
    tracked = run.tracking.kind.uses_mlflow
    if mode == "aws" and address and tracked and is_local_uri(address):
        key = "tracking.uri" if run.tracking.uri else "hydra.launcher.mlflow_uri"
        problems.append(f"jobs on AWS cannot reach MLflow at {address}: type {key}=https://SERVER, or {key}=null to "
                        "keep their metrics in their own folders")
    try:
        resolve(job_inputs.without_s3_paths(run), Path(run.run_root))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return run, _plan(job) if launcher["plan"] else {}


def _plan(job: LauncherJob) -> Mapping[str, Any]:
    """Return the output of the planner for a job, or {} if torch is not installed.

    A plan takes 10 seconds or more. Jobs that differ only in WITHOUT_EFFECT_ON_PLAN therefore share that of the first.

    Raises:
        ConfigError: the job needs more memory or disk than its instance has, or the planner failed.
    """
    overrides = [override for override in job.overrides if S3_SCHEME not in override]
    rate = job.budget.interruptions_per_hour
    if rate is not None and job.spot_price_usd_hour is not None:
        overrides.append(f"budget.interruptions_per_hour={rate:g}")
    key = tuple(word for word in overrides if word.partition("=")[0].lstrip("+") not in WITHOUT_EFFECT_ON_PLAN)
    if key not in _plans:
        _plans[key] = _run_planner(overrides)
    plan, problem = _plans[key]
    if problem:
        raise ConfigError(problem)
    return plan


def _run_planner(overrides: Sequence[str]) -> tuple[Mapping[str, Any], str]:
    """Run the planner in a child process, since it needs torch. Return its output, and why it refuses the run or ""."""
    if find_spec("torch") is None:
        print("torch is not installed here: it is not checked whether the jobs fit in memory", flush=True)
        return {}, ""
    planner = subprocess.run([sys.executable, *PLANNER_ARGUMENTS, *overrides], capture_output=True, text=True,
                             check=False, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        plan: dict[str, Any] = json.loads(planner.stdout)
    except ValueError:
        plan = {}
    if planner.returncode:
        message = planner.stderr.strip().removeprefix("dreambooth: ") or (
            f"the planner ended with {planner.returncode}")
        return plan, " ".join(message.split())[:600]
    return plan, ""


def _build_job(composed: LauncherJob, run: Config, plan: Mapping[str, Any], sweep: str, backend: Any, mode: str,
               inputs: Inputs, defaults: Mapping[str, Any], submit: bool = False) -> Job:
    """Build a job and its request.

    Args:
        defaults: the SageMaker SDK's defaults, which are added to the request.
        submit: whether the job is about to be submitted. If hydra.launcher.resubmit is also true, a job that has failed
            before gets a new name. The job of a pruned trial keeps its name, so that only its end is read.
    """
    settings, number, overrides = _job_settings(composed), composed.number, composed.overrides
    price, spot_usd_hour = composed.price_usd_hour, None
    usd_hour = None if price is None or mode == "docker" else price * settings.instance_count
    if settings.spot and usd_hour is not None and composed.spot_price_usd_hour is not None:
        spot_usd_hour = composed.spot_price_usd_hour * settings.instance_count
    allowed, _ = composed.budget.hours(spot_usd_hour or usd_hour)  # AWS itself stops a job that alone passes the budget
    settings = replace(settings, max_run_hours=max(min(settings.max_run_hours, allowed), 1 / 3600))
    channels, contents = inputs.channels(run, settings.s3), inputs.contents(run)
    hyperparameters = build_hyperparameters(overrides, channels, sweep, composed.run_name,
                                            settings.mlflow_uri if run.tracking.uri is None else None)
    name = first_name = job_name(sweep, number, hyperparameters, contents)
    if submit and composed.launcher["resubmit"] and mode == "aws":
        attempt = 0
        while backend.has_failed(name):
            attempt += 1
            name = job_name(sweep, number, hyperparameters, contents, attempt)
    request = build_request(settings, name, sweep, hyperparameters, channels, composed.disk_gib, plan.get("disk_gib"),
                            first_name)
    request, added = sdk_defaults.apply(request, defaults, has_own_disk=composed.disk_gib is not None)
    seconds = plan.get("run_seconds" if spot_usd_hour is None else "spot_seconds")
    cost = None if seconds is None or usd_hour is None else seconds / 3600 * (spot_usd_hour or usd_hour)
    return Job(number, name, overrides, request, run.train.max_train_steps, usd_hour, cost, seconds, added,
               spot_usd_hour)


def _job_settings(composed: LauncherJob) -> JobSettings:
    launcher = composed.launcher
    return JobSettings(**{item.name: launcher[item.name] for item in fields(JobSettings)} | {
        "subnets": tuple(launcher["subnets"]), "security_groups": tuple(launcher["security_groups"]),
        "role": launcher["role"] or "", "s3": launcher["s3"] or str(Path.cwd()),
        "instance_type": launcher["instance_type"] or "local"})
