"""Kubeflow Trainer v2: a run as a TrainJob, on one card or data parallel on several.

The runtime `torch-distributed` sets PET_* in the environment; torchrun reads them.
"""

from dataclasses import replace
from typing import Any

from dreambooth.errors import UserError
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import Asked, run_words

API = "trainer.kubeflow.org/v1alpha1"
NAME = "dreambooth"
RUNTIME = "torch-distributed"
MANAGER = "dreambooth.workflows"  # who owns the patch
LARGER = {"g4dn": ("12xlarge", 4, 192), "g5": ("12xlarge", 4, 192), "g6": ("12xlarge", 4, 192)}  # cards, GiB


def single(asked: Asked) -> dict[str, Any]:
    """A run in one process."""
    return _job(asked, NAME, ["python", "-m", "dreambooth.train"], [], 1)


def multi(asked: Asked) -> dict[str, Any]:
    """A run on the larger machine of the same family, a process a card.

    Raises:
        UserError: no larger one is known.
    """
    if asked.hardware.name not in LARGER:
        raise UserError(f"no machine with several cards is known for hardware={asked.hardware.name}: type hardware= "
                        f"one of {', '.join(LARGER)}")
    size, cards, memory = LARGER[asked.hardware.name]
    nodes = dict.fromkeys(asked.hardware.node_selector, f"{asked.hardware.name}.{size}")
    larger = replace(asked, hardware=replace(asked.hardware, node_selector=nodes, host_ram_gib=memory))
    return _job(larger, f"{NAME}-{cards}gpu", ["torchrun"], ["-m", "dreambooth.train"], cards)


def _job(asked: Asked, name: str, command: list[str], before: list[str], cards: int) -> dict[str, Any]:
    return {
        "apiVersion": API, "kind": "TrainJob", "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": RUNTIME},
            "trainer": {
                "image": asked.image, "command": command, "args": [*before, *run_words(asked, pod_spec.RUNS)],
                "numNodes": 1, "numProcPerNode": cards, "env": [*pod_spec.environment(), *pod_spec.named()],
                "resourcesPerNode": pod_spec.resources(asked.hardware, cards)},
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": _patch(asked)}]}}


def _patch(asked: Asked) -> dict[str, Any]:
    """What the runtime's pod template lacks: nodes, the volume, the user, the account. `node` is what trains."""
    pod = {**pod_spec.placement(asked.hardware), "serviceAccountName": pod_spec.ACCOUNT,
           "securityContext": pod_spec.security(),
           "terminationGracePeriodSeconds": pod_spec.SAVING, "volumes": pod_spec.volumes(),
           "containers": [{"name": "node", "volumeMounts": pod_spec.mounts()}]}
    return {"template": {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {
        "spec": pod}}}}]}}}
