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

from dreambooth import storage
from dreambooth.cloud import request
from dreambooth.cloud.job import Job
from dreambooth.cloud.request import CHANNELS, Settings
from dreambooth.config import load
from dreambooth.errors import ConfigError
from dreambooth.recipe import resolve
from dreambooth.schema import Config

PLAN = ("-m", "dreambooth.plan", "plan.format=json")
NOT_SENT = ("evaluate.reference_dir", "checkpoint.resume")  # no channel for them


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
    places: dict[str, str] = {}  # folder of this machine -> where jobs find it
    jobs = [_job(config, run, plan, sweep, backend, mode, places) for config, run, plan in checked]
    problems = [f"job {job.number}: {problem}" for job in jobs for problem in (
        *request.secrets(job.request), *backend.problems(job.request))]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    for folder, place in places.items():
        if storage.is_remote(place):
            storage.upload(Path(folder), place)
    return [_job(config, run, plan, sweep, backend, mode, places, last=True) for config, run, plan in checked]


def whole(uri: str) -> bool:
    """Whether a base model in S3 is complete: SageMaker would hand over half of one."""
    return storage.complete(uri) is not None


def task(config: DictConfig) -> DictConfig:
    """The config without Hydra's own part."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def announced(jobs: Sequence[Job]) -> Iterator[str]:
    """What will run and what it may cost, a line a job."""
    for job in jobs:
        resources = job.request["ResourceConfig"]
        price = "price unknown" if job.usd_hour is None else f"${job.usd_hour:.4g}/h"
        about = "" if job.estimate_usd is None else f", about ${job.estimate_usd:.2f}"
        hours = "" if job.estimate_seconds is None else f" for {job.estimate_seconds / 3600:.1f} h"
        kind = "spot, at most " if job.spot else ""
        yield (f"{job.name}  {resources['InstanceCount']} x {resources['InstanceType']}  {kind}{price}{hours}{about}  "
               f"{' '.join(job.overrides)}")
    known = [job.estimate_usd for job in jobs if job.estimate_usd is not None]
    if known:
        yield f"{len(jobs)} jobs, about ${sum(known):.2f} (estimate: see docs/planner.md)"


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
    for key in CHANNELS:
        folder = OmegaConf.select(config, key)
        if folder and key.startswith("dataset.") and not _elsewhere(folder) and not Path(folder).is_dir():
            missing.append(f"there is no folder {folder}: type {key}=DIR")
    if storage.is_remote(run.model.source) and not whole(run.model.source):
        missing.append(f"{run.model.source} is half uploaded, or was put there by something else: type python -m "
                       f"dreambooth.storage upload FOLDER {run.model.source}")
    for key in NOT_SENT:
        folder = OmegaConf.select(config, key)
        if folder and not _elsewhere(folder) and folder not in ("auto", "never"):
            missing.append(f"{key}={folder} is a folder of this machine: type {key}=s3://BUCKET/FOLDER")
    missing += _unsent_data(run)
    try:
        if storage.is_remote(run.checkpoint.resume):
            run.checkpoint.resume = "auto"
        resolve(run, Path(run.run_root))
    except ConfigError as error:
        missing += error.problems
    if missing:
        raise ConfigError(*missing)
    return run, _planned(config) if launcher.plan else {}


def _unsent_data(run: Config) -> Iterator[str]:
    """Folders of the data that no channel carries: of several subjects, and of masks."""
    for place, subject in run.dataset.places:
        for key in ("instance_dir", "class_dir", "mask") if run.dataset.concepts else ("mask",):
            folder = getattr(subject, key)
            if folder and folder != "alpha" and not _elsewhere(folder):
                yield f"{place}.{key}={folder} is a folder of this machine: type {place}.{key}=s3://BUCKET/FOLDER"


def _planned(config: DictConfig) -> dict[str, Any]:
    """What the planner says, in a process of its own; nothing without torch."""
    if find_spec("torch") is None:
        print("torch is not installed here: whether the jobs fit was not looked at", flush=True)
        return {}
    words = [word for word in config.hydra.overrides.task if storage.SCHEME not in word]
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
         places: dict[str, str], last: bool = False) -> Job:
    """A job. `last`: it is to be submitted, and one that ended badly gets another name."""
    launcher: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
    number, overrides = config.hydra.job.num, tuple(config.hydra.overrides.task)
    price = launcher["price_usd_hour"] if _same_machine(overrides) else None
    name = first = request.name_of(sweep, number, overrides)
    if last and launcher["resubmit"] and mode == "aws":
        attempt = 0
        while backend.ended_badly(name):
            attempt += 1
            name = request.name_of(sweep, number, overrides, attempt)
    settings = Settings(**{item.name: launcher[item.name] for item in fields(Settings)} | {
        "subnets": tuple(launcher["subnets"]), "security_groups": tuple(launcher["security_groups"]),
        "role": launcher["role"] or "", "s3": launcher["s3"] or str(Path.cwd()),
        "instance_type": launcher["instance_type"] or "local"})
    disk = launcher["disk_gib"] if _same_machine(overrides) else None
    inputs = dict(_inputs(run, settings.s3, mode, places))
    asked = request.request(settings, name, sweep, overrides, inputs, disk, plan.get("disk_gib"), first)
    count = settings.instance_count
    hourly = None if price is None or mode == "docker" else price * count
    seconds = plan.get("run_seconds")
    cost = None if seconds is None or hourly is None else seconds / 3600 * hourly
    return Job(number, name, overrides, asked, run.train.max_train_steps, hourly, cost, seconds)


def _same_machine(overrides: Sequence[str]) -> bool:
    """Whether price and disk of the hardware file are those of the instance: not if another type was typed alone."""
    typed = {word.lstrip("+").partition("=")[0] for word in overrides}
    return "hardware.instance_type" not in typed or "hardware.price_usd_hour" in typed


def _inputs(run: Config, s3: str, mode: str, places: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Channel -> where its folder is. A folder of this machine is read once a sweep: its content names its place."""
    for key, channel in CHANNELS.items():
        section, _, name = key.partition(".")
        folder = getattr(getattr(run, section), name)
        if not folder or folder.startswith("package:"):
            continue
        if storage.is_remote(folder):
            yield channel, folder
        elif Path(folder).is_dir():  # else a hub id
            if folder not in places:
                path = Path(folder).absolute()
                places[folder] = str(path) if mode == "docker" else (
                    f"{s3.rstrip('/')}/inputs/{path.name}-{storage.digest(path)}")
            yield channel, places[folder]


def _elsewhere(path: str) -> bool:
    return path.startswith((storage.SCHEME, "package:"))
