"""Defines the inputs for rendering workflow files: overrides, search space, hardware and container image."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dreambooth.config.compose import SearchSpace
from dreambooth.config.hardware import Hardware
from dreambooth.kubernetes import pod_spec

# Override that gives a trial the same run folder as under Hydra's sweeper. The hash in the folder's name depends on
# max_train_steps, so that trials that differ only in max_train_steps are separate runs.
TRIAL_RUN_DIR = "hydra.run.dir=${run_root}/${name}-${identity:sweep}"
TRACKING_URI = "${oc.env:MLFLOW_TRACKING_URI,null}"  # null: without a server, MLflow uses a SQLite file in run_root
TRACKING_OVERRIDE = f"tracking.uri={TRACKING_URI}"


@dataclass(frozen=True)
class WorkflowSpec:
    """The inputs for rendering one set of workflow files."""

    overrides: tuple[str, ...]  # overrides of every run
    space: SearchSpace
    hardware: Hardware
    image: str
    model_name: str = "dreambooth"  # name of the registered model: `name` of the runs
    overlays: Mapping[str, "WorkflowSpec"] = field(default_factory=dict)  # overlay name -> spec for its machine
    queue: str | None = None  # LocalQueue of Kueue, in which pods with a GPU wait; None: Kueue is not used
    priority: str | None = None  # WorkloadPriorityClass of Kueue; None: the queue's default

    @property
    def queue_labels(self) -> dict[str, str]:
        """Labels of a job or pod that Kueue admits; {} without a queue (kueue.sigs.k8s.io/docs/tasks/run/)."""
        if self.queue is None:
            return {}
        priority = {"kueue.x-k8s.io/priority-class": self.priority} if self.priority else {}
        return {"kueue.x-k8s.io/queue-name": self.queue, **priority}

    @property
    def queue_metadata(self) -> dict[str, Any]:
        """The labels as the metadata of an object or of a pod template; {} without a queue."""
        return {"metadata": {"labels": self.queue_labels}} if self.queue else {}

    @property
    def overrides_text(self) -> str:
        """The overrides as one string, quoted for a shell, and escaped for the args of a container."""
        return pod_spec.escape_variables(shlex.join(self.overrides))


def run_overrides(spec: WorkflowSpec, run_root: str) -> list[str]:
    """Return the overrides of a run as a list of command-line arguments.

    These are the overrides of `spec`, the folder that contains all run folders, and the address of the tracking server.
    """
    return [*spec.overrides, f"run_root={run_root}", TRACKING_OVERRIDE]
