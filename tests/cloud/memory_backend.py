"""A backend in memory, and a sweep of the launcher that runs on it."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dreambooth.cloud.follower import Follower
from dreambooth.cloud.job import COMPLETED, RUNNING, Job, JobState
from dreambooth.config.enums import TrackingKind
from hydra_plugins.dreambooth_sagemaker import _core
from hydra_plugins.dreambooth_sagemaker._sweep import SweepState
from hydra_plugins.dreambooth_sagemaker.launcher import SageMakerLauncherConf

HYPER = {"train.seed": "1"}


def jobs(count: int, machine: Callable[[int], str] = lambda number: "ml.g4dn.xlarge") -> list[Job]:
    return [Job(i, f"j{i}", (f"train.seed={i}",), {
        "TrainingJobName": f"j{i}", "HyperParameters": HYPER, "ResourceConfig": {"InstanceType": machine(i)}}, 1)
        for i in range(count)]


def sweep_state(**settings: Any) -> Any:
    return SweepState(vars(SageMakerLauncherConf()) | settings, settings.get("sweep"))


class Cloud:
    """A backend in memory. `polls`: how often each job is polled before it is completed."""

    def __init__(self, polls: int = 1) -> None:
        self.polls, self.left, self.stopped = polls, dict[str, int](), list[str]()

    def submit(self, job: Job) -> JobState:
        self.left.setdefault(job.name, self.polls)
        return JobState(RUNNING, "Training")

    def poll(self, job: Job) -> JobState:
        self.left[job.name] -= 1
        return JobState(RUNNING) if self.left[job.name] > 0 else JobState(COMPLETED, result={"objective": 0.5})

    def stop(self, job: Job) -> bool:
        self.stopped.append(job.name)
        return job.name in self.left

    def stop_command(self, job: Job) -> str:
        return f"stop {job.name}"


def make_follower(backend: Any, jobs: list[Job], **options: Any) -> Follower:
    turns = iter(range(100))  # ends a loop that never would
    return Follower(backend, jobs, **({"max_parallel": 4, "poll_seconds": 1, "stop_on_interrupt": False,
                                       "follow_hint": "AGAIN", "sleep": lambda seconds: next(turns)} | options))


def run_on(cloud: Any, jobs: list[Job], folder: Path, monkeypatch: pytest.MonkeyPatch, max_parallel: int = 4,
           **hydra: Any) -> list[Any]:
    """Run jobs by the launcher's code for backends, on a backend of the test."""
    monkeypatch.setattr(_core, "SageMakerBackend", lambda: cloud)
    monkeypatch.setattr(_core, "prepare_jobs", lambda *args: jobs)
    monkeypatch.setattr(_core, "describe_jobs", lambda jobs, mode: ["description"])
    monkeypatch.setattr(_core, "without_hydra", lambda config: config)
    sweep = sweep_state(poll_seconds=0, sweep="mine", max_parallel=max_parallel)
    config = OmegaConf.create({
        "run_root": str(folder), "tracking": {"kind": TrackingKind.none, "uri": None, "experiment": "x"},
        "hydra": {"sweep": {"dir": str(folder)}, "job": {"name": "train"}, "sweeper": {},
                  "launcher": {"mlflow_uri": None}} | hydra})
    sweep.config = config
    return _core._run_on_backend(sweep, [config] * len(jobs), [])


def read_table(folder: Path) -> dict[str, str]:
    with (folder / "results-mine.csv").open() as file:
        return {row["job"]: row["status"] for row in csv.DictReader(file)}
