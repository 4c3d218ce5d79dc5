"""The launcher's class and settings, for Hydra. The implementation is in _core.py, imported for sweeps only."""

# No `from __future__ import annotations` here: Hydra's scanner executes this file before it is in sys.modules, where
# dataclasses look up string annotations. With that import, Hydra would fail to start.
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SlurmLauncherConf:
    """Schema of conf/hydra/launcher/slurm.yaml, which explains each key."""

    _target_: str = "hydra_plugins.dreambooth_slurm.launcher.SlurmLauncher"
    image: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int = 2
    mem_gib: int | None = None
    timeout_min: int = 1440
    max_parallel: int = 4
    poll_seconds: float = 10.0
    additional_parameters: dict[str, str] = field(default_factory=dict)


class SlurmLauncher(Launcher):
    """Runs the jobs of a sweep and returns their objectives to the sweeper."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hydra_plugins.dreambooth_slurm import _core

        assert self.config is not None and self.hydra_context is not None
        return _core.launch(self.settings, self.config, self.hydra_context, job_overrides, initial_job_idx)


ConfigStore.instance().store(
    group="hydra/launcher", name="slurm_schema", node=SlurmLauncherConf, provider="dreambooth")
