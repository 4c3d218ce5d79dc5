"""The state of a sweep that the launcher runs."""

from dataclasses import dataclass, field
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SweepState:
    """Settings and results of a sweep. They are kept between the batches of jobs in the sweep.

    Hydra calls the launcher once per batch of jobs.
    """

    settings: dict[str, Any]  # of the launcher; settings that differ between jobs are read from each job's config
    name: str | None = None  # set by the first launch if the user gave none
    config: DictConfig | None = None
    task_function: TaskFunction | None = None
    hydra_context: HydraContext | None = None
    table: list[dict[str, Any]] = field(default_factory=list)  # result rows of every launch so far
    done: dict[tuple[str, ...], Any] = field(default_factory=dict)  # job and state of each completed job, by overrides
    spending: Any = None  # a Spending: the budget of the sweep, and what its batches have used
