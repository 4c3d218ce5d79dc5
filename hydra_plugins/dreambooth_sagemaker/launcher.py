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

from hydra_plugins.dreambooth_sagemaker._sweep import SweepState


@dataclass
class SageMakerLauncherConf:
    """Schema of conf/hydra/launcher/sagemaker.yaml, which explains each key."""

    _target_: str = "hydra_plugins.dreambooth_sagemaker.launcher.SageMakerLauncher"
    mode: str = "aws"
    image: str | None = None
    role: str | None = None
    s3: str | None = None
    sweep: str | None = None
    resubmit: bool = False
    max_parallel: int = 4
    poll_seconds: float = 20.0
    on_interrupt: str = "leave"
    plan: bool = True
    instance_type: str | None = None
    instance_count: int = 1
    price_usd_hour: float | None = None
    disk_gib: float | None = None
    volume_gib: int | None = None
    spot: bool = False
    attempts: int = 3
    max_run_hours: float = 24.0
    max_wait_hours: float = 36.0
    keep_alive_minutes: int = 0
    subnets: list[str] = field(default_factory=list)
    security_groups: list[str] = field(default_factory=list)
    kms_key: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    allocator: str | None = None
    mlflow_uri: str | None = None
    mlflow_secret: str | None = None


class SageMakerLauncher(Launcher):
    """Runs the jobs of a sweep and returns their objectives to the sweeper."""

    def __init__(self, **settings: Any) -> None:
        self.sweep = SweepState(settings, settings.get("sweep"))

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.sweep.hydra_context, self.sweep.task_function, self.sweep.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hydra_plugins.dreambooth_sagemaker import _core

        return _core.launch(self.sweep, job_overrides, initial_job_idx)


ConfigStore.instance().store(
    group="hydra/launcher", name="sagemaker_schema", node=SageMakerLauncherConf, provider="dreambooth")
