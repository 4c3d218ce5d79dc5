"""Composed jobs -> jobs that may be submitted: every one is checked before the first is paid for."""

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

from dreambooth.cloud import secrets, training_job_request
from dreambooth.cloud.job import Job
from dreambooth.cloud.training_job_request import Settings
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.enums import TrackingKind
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config
from dreambooth.config.storage import SCHEME
from dreambooth.errors import ConfigError
from dreambooth.sweeps.hydra_callbacks import named
from hydra_plugins.dreambooth_sagemaker import _inputs
from hydra_plugins.dreambooth_sagemaker._inputs import Inputs

PLAN = ("-m", "dreambooth.plan", "plan.format=json")


def refuse_secrets(configs: Sequence[DictConfig], sweep: str) -> None:
    """Before anything else can end the command, and without a trace: Hydra has kept what was typed already.

    Raises:
        ConfigError: a request would hold what looks like a credential.
    """
    problems = [f"job {config.hydra.job.num}: {problem}" for config in configs for problem in secrets.found_in(
        training_job_request.request(_settings(config), "", sweep, training_job_request.hyperparameters(
            config.hydra.overrides.task, (), sweep), {}, None, None))]
    if problems:
        (Path(str(configs[0].hydra.sweep.dir)) / "multirun.yaml").unlink(missing_ok=True)
        raise ConfigError(*dict.fromkeys(problems))


def prepared(configs: Sequence[DictConfig], sweep: str, backend: Any, mode: str) -> list[Job]:
    """Every job of the sweep.

    Raises:
        ConfigError: what is wrong with any of them, all of it; nothing was submitted or uploaded.
    """
    problems: list[str] = []
    checked: list[tuple[DictConfig, Config, dict[str, Any]]] = []
    for config in configs:
        try:
            checked.append((config, *_checked(config, mode)))
        except ConfigError as error:
            problems += [f"job {config.hydra.job.num}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    inputs = Inputs(mode)
    problems = [f"job {config.hydra.job.num}: {problem}"
                for config, run, _ in checked for problem in inputs.problems(run)]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    jobs = [_job(config, run, plan, sweep, backend, mode, inputs) for config, run, plan in checked]
    problems = [f"job {job.number}: {problem}" for job in jobs for problem in backend.problems(job.request)]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    inputs.upload()
    return [_job(config, run, plan, sweep, backend, mode, inputs, last=True) for config, run, plan in checked]


def task(config: DictConfig) -> DictConfig:
    """The config without Hydra's own part."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def announced(jobs: Sequence[Job], mode: str = "aws") -> Iterator[str]:
    """What will run and what it may cost, a line a job."""
    for job in jobs:
        resources = job.request["ResourceConfig"]
        price = f"${job.usd_hour:.4g}/h" if job.usd_hour is not None else "price unknown" if mode == "aws" else "here"
        about = "" if job.estimate_usd is None else f", about ${job.estimate_usd:.2f}"
        hours = "" if job.estimate_seconds is None else f" for {job.estimate_seconds / 3600:.1f} h"
        kind = "spot, at most " if job.spot else ""
        yield (f"{job.name}  {resources['InstanceCount']} x {resources['InstanceType']}  {kind}{price}{hours}{about}  "
               f"{' '.join(job.overrides)}")
    known = [job.estimate_usd for job in jobs if job.estimate_usd is not None]
    lacking = sum(job.usd_hour is None for job in jobs) if mode == "aws" else 0
    if known or lacking:
        total = f", about ${sum(known):.2f}" + f" for {len(known)} of them" * (len(known) < len(jobs))
        yield (f"{len(jobs)} jobs{total * bool(known)}"
               + f"; {lacking} without a price: type hydra.launcher.price_usd_hour=PRICE" * bool(lacking)
               + " (estimate: see docs/planner.md)" * bool(known))


def _checked(config: DictConfig, mode: str) -> tuple[Config, dict[str, Any]]:
    """A job's own rules: the run's, the launcher's, and whether it fits."""
    run, launcher = load(task(config)), config.hydra.launcher
    missing = [] if mode == "docker" else [
        f"{what} is missing: type hydra.launcher.{key}={example}" for key, what, example in (
            ("role", "the execution role", "arn:aws:iam::ACCOUNT:role/NAME"),
            ("s3", "the place for results", "s3://BUCKET/FOLDER"),
            ("instance_type", "the instance type", "ml.g4dn.xlarge, or a hardware= that has one")) if not launcher[key]]
    if not launcher.image:
        missing.append("the image is missing: type hydra.launcher.image=ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG")
    if launcher.spot and launcher.keep_alive_minutes:
        missing.append("spot instances have no warm pool: type hydra.launcher.keep_alive_minutes=0, or spot=false")
    if bool(launcher.subnets) != bool(launcher.security_groups):
        missing.append("a VPC needs both: type hydra.launcher.subnets=[...] and hydra.launcher.security_groups=[...]")
    missing += [f"{override} deletes a key, which a job cannot be told: leave it out"
                for override in config.hydra.overrides.task if override.startswith("~")]
    for key in ("instance_dir", "class_dir"):
        folder = getattr(run.dataset, key)
        if folder and not _inputs.elsewhere(folder) and not Path(folder).is_dir():
            missing.append(f"there is no folder {folder}: type dataset.{key}=DIR")
    missing += _inputs.unsent(run)
    address = run.tracking.uri or launcher.mlflow_uri
    tracked = run.tracking.kind is TrackingKind.mlflow
    if mode == "aws" and address and tracked and training_job_request.only_here(address):
        key = "tracking.uri" if run.tracking.uri else "hydra.launcher.mlflow_uri"
        missing.append(f"jobs on AWS do not reach MLflow at {address}: type {key}=https://SERVER, or {key}=null, which "
                       "keeps their metrics in their own folders")
    try:
        resolve(_inputs.without_s3(run), Path(run.run_root))
    except ConfigError as error:
        missing += error.problems
    if missing:
        raise ConfigError(*missing)
    return run, _planned(config) if launcher.plan else {}


def _planned(config: DictConfig) -> dict[str, Any]:
    """What the planner says, in a process of its own; nothing without torch."""
    if find_spec("torch") is None:
        print("torch is not installed here: whether the jobs fit was not looked at", flush=True)
        return {}
    words = [word for word in config.hydra.overrides.task if SCHEME not in word]
    ran = subprocess.run([sys.executable, *PLAN, *words], capture_output=True, text=True, check=False,
                         env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        found: dict[str, Any] = json.loads(ran.stdout)
    except ValueError:
        found = {}
    if ran.returncode:
        said = ran.stderr.strip().removeprefix("dreambooth: ") or f"the planner ended with {ran.returncode}"
        raise ConfigError(" ".join(said.split())[:600])
    return found


def _job(config: DictConfig, run: Config, plan: Mapping[str, Any], sweep: str, backend: Any, mode: str,
         inputs: Inputs, last: bool = False) -> Job:
    """A job. `last`: it is to be submitted, and one that ended badly gets another name."""
    settings, launcher = _settings(config), config.hydra.launcher
    number, overrides = config.hydra.job.num, tuple(config.hydra.overrides.task)
    channels, contents = inputs.channels(run, settings.s3), inputs.contents(run)
    sent = training_job_request.hyperparameters(overrides, channels, sweep, named(list(overrides)),
                                   settings.mlflow_uri if run.tracking.uri is None else None)
    name = first = training_job_request.name_of(sweep, number, sent, contents)
    if last and launcher.resubmit and mode == "aws":
        attempt = 0
        while backend.ended_badly(name):
            attempt += 1
            name = training_job_request.name_of(sweep, number, sent, contents, attempt)
    asked = training_job_request.request(settings, name, sweep, sent, channels, _of_machine(config, "disk_gib"),
                            plan.get("disk_gib"), first)
    price = _of_machine(config, "price_usd_hour")
    hourly = None if price is None or mode == "docker" else price * settings.instance_count
    seconds = plan.get("run_seconds")
    cost = None if seconds is None or hourly is None else seconds / 3600 * hourly
    return Job(number, name, overrides, asked, run.train.max_train_steps, hourly, cost, seconds)


def _settings(config: DictConfig) -> Settings:
    launcher: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
    return Settings(**{item.name: launcher[item.name] for item in fields(Settings)} | {
        "subnets": tuple(launcher["subnets"]), "security_groups": tuple(launcher["security_groups"]),
        "role": launcher["role"] or "", "s3": launcher["s3"] or str(Path.cwd()),
        "instance_type": launcher["instance_type"] or "local"})


def _of_machine(config: DictConfig, key: str) -> float | None:
    """Price or disk of a job's instance: as it was typed, else as the hardware file has it for its own instance type.
    None: unknown."""
    launcher = config.hydra.launcher
    words = {word.lstrip("+").partition("=")[0] for word in config.hydra.overrides.task}
    file = conf_dir() / "hardware" / f"{config.hydra.runtime.choices.get('hardware')}.yaml"
    known = OmegaConf.load(file).instance_type if file.is_file() else (  # else an option of the user's own
        None if "hardware.instance_type" in words else config.hardware.instance_type)
    typed = not OmegaConf.is_interpolation(launcher, key) or f"hardware.{key}" in words
    found: float | None = launcher[key] if typed or launcher.instance_type == known else None
    return found
