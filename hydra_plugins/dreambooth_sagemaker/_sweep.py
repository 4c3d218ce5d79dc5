"""A sweep that the launcher runs: what Hydra gave it, and its results so far."""

from dataclasses import dataclass, field
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class Sweep:
    """State of one launcher. Hydra's sweepers may call `launch` several times, once per batch of jobs."""

    settings: dict[str, Any]  # of the sweep; what may differ between jobs is read from each job's own config
    name: str | None = None  # made up by the first launch if none was typed
    config: DictConfig | None = None
    task_function: TaskFunction | None = None
    hydra_context: HydraContext | None = None
    table: list[dict[str, Any]] = field(default_factory=list)  # results of every launch of this sweep
    done: dict[tuple[str, ...], Any] = field(default_factory=dict)  # its points that have a result
