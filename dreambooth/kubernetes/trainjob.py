"""Builds the TrainJob of a run for Kubeflow Trainer v2, with one GPU or with data parallel training on several GPUs.

The runtime `torch-distributed` sets PET_* environment variables, which torchrun reads.
"""

from dataclasses import replace
from typing import Any

from dreambooth.errors import UserError
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import WorkflowSpec, run_overrides

API_VERSION = "trainer.kubeflow.org/v1alpha1"
NAME = "dreambooth"
RUNTIME = "torch-distributed"
MANAGER = "dreambooth.workflows"  # field manager of the runtime patch
NODES = 2  # of the TrainJob with several nodes
DEFAULT_QUEUE = "dreambooth"  # LocalQueue of Kueue for that TrainJob
MULTI_GPU_MACHINES = {  # hardware option -> size of a larger instance, its number of GPUs, its host memory in GiB
    "g4dn": ("12xlarge", 4, 192), "g5": ("12xlarge", 4, 192), "g6": ("12xlarge", 4, 192)}


def build_trainjob(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the TrainJob of a run with a single training process."""
    return _trainjob(spec, NAME, ["python", "-m", "dreambooth.train"], [], 1)


def build_multi_node_trainjob(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the TrainJob of a run on two nodes with several GPUs each, which start together.

    The TrainJob is suspended until Kueue admits it. Kueue admits the JobSet of a TrainJob as a whole, when there is
    quota for all of its pods: no pod holds a GPU while it waits for another one. The queue is `spec.queue`, or
    DEFAULT_QUEUE.

    Raises:
        UserError: MULTI_GPU_MACHINES contains no larger instance for `spec.hardware`.
    """
    job = build_multi_gpu_trainjob(replace(spec, queue=spec.queue or DEFAULT_QUEUE))
    job["metadata"]["name"] = f"{NAME}-{NODES}nodes"
    job["spec"]["trainer"]["numNodes"] = NODES
    return {**job, "spec": {"suspend": True, **job["spec"]}}


def build_multi_gpu_trainjob(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the TrainJob of a run with one process per GPU.

    It runs on a larger AWS instance than `spec.hardware`, of the same instance family: on g5.12xlarge instead of g5.

    Raises:
        UserError: MULTI_GPU_MACHINES contains no larger instance for `spec.hardware`.
    """
    if spec.hardware.name not in MULTI_GPU_MACHINES:
        raise UserError(f"no machine with several GPUs is known for hardware={spec.hardware.name}: type hardware= "
                        f"one of {', '.join(MULTI_GPU_MACHINES)}")
    size, gpus, memory = MULTI_GPU_MACHINES[spec.hardware.name]
    node_selector = dict.fromkeys(spec.hardware.node_selector, f"{spec.hardware.name}.{size}")
    larger = replace(spec, hardware=replace(spec.hardware, node_selector=node_selector, host_ram_gib=memory))
    return _trainjob(larger, f"{NAME}-{gpus}gpu", ["torchrun"], ["-m", "dreambooth.train"], gpus)


def _trainjob(spec: WorkflowSpec, name: str, command: list[str], module_args: list[str], gpus: int) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION, "kind": "TrainJob", "metadata": {
            "name": name, **spec.queue_metadata.get("metadata", {})},
        "spec": {
            "runtimeRef": {"name": RUNTIME},
            "trainer": {
                "image": spec.image, "command": command,
                "args": [*module_args, *map(pod_spec.escape_variables, run_overrides(spec, pod_spec.RUNS_MOUNT))],
                "numNodes": 1, "numProcPerNode": gpus, "env": [*pod_spec.env(), *pod_spec.env_by_key()],
                "resourcesPerNode": pod_spec.resources(spec.hardware, gpus)},
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": _runtime_patch(spec)}]}}


def _runtime_patch(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the patch of the runtime's pod template: node selector, volume, user and service account.

    The runtime has a replicated job named `node`, whose container is also named `node`. This container trains.
    """
    pod = {**pod_spec.placement(spec.hardware), "serviceAccountName": pod_spec.SERVICE_ACCOUNT,
           "securityContext": pod_spec.security_context(),
           "terminationGracePeriodSeconds": pod_spec.GRACE_PERIOD, "volumes": pod_spec.volumes(),
           "containers": [{"name": "node", "volumeMounts": pod_spec.volume_mounts()}]}
    return {"template": {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {
        "spec": pod}}}}]}}}
