"""Builds the task of a run for SkyPilot, which starts it on a spot instance of any cloud, and again after it is lost.

Source of the keys: https://docs.skypilot.co/en/latest/reference/yaml-spec.html and .../examples/managed-jobs.html.
"""

import math
from shlex import quote
from typing import Any

from dreambooth.config.enums import Device
from dreambooth.config.hardware import Hardware
from dreambooth.errors import Interrupted
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import TRACKING_OVERRIDE, WorkflowSpec

FILE = "skypilot/train.yaml"
PORT = 29500  # PyTorch's default
# A new instance has an empty disk: it continues from the checkpoints in S3.
UPLOAD = ("storage.upload=s3://BUCKET/runs", "storage.checkpoints=true")
BUDGET = {"budget.max_usd", "budget.max_hours"}
ANY_GPU = ["T4:1", "L4:1", "A10G:1"]  # for hardware=local, whose GPU has no name
RUN = """\
train=(-m dreambooth.train {overrides})
processes=$(( SKYPILOT_NUM_GPUS_PER_NODE > 1 ? SKYPILOT_NUM_GPUS_PER_NODE : 1 ))
if (( SKYPILOT_NUM_NODES * processes == 1 )); then
    exec python "${{train[@]}}"
fi
exec python -m dreambooth.container.torchrun --nproc-per-node "$processes" --nnodes "$SKYPILOT_NUM_NODES" \\
    --node-rank "$SKYPILOT_NODE_RANK" --master-addr "${{SKYPILOT_NODE_IPS%%[[:space:]]*}}" --master-port {port} \\
    "${{train[@]}}"
"""


def build_task(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the task of `sky jobs launch`. With `--num-nodes 2`, it trains data parallel on two nodes."""
    typed = {override.partition("=")[0] for override in spec.overrides}
    upload = [word for word in UPLOAD if word.partition("=")[0] not in typed]
    overrides = " ".join(map(quote, [*spec.overrides, *upload, TRACKING_OVERRIDE, "run_root=runs"]))
    return {
        "name": "dreambooth", "num_nodes": 1,
        "resources": _resources(spec.hardware, spec.image, limited=bool(typed & BUDGET)),
        "run": RUN.format(overrides=overrides, port=PORT)}


def _resources(hardware: Hardware, image: str, limited: bool) -> dict[str, Any]:
    """Return the instance: the image, the GPU, and at least the host memory that a pod would get.

    Args:
        limited: the run has a budget. It is then not started again when it ends with the exit code of an interrupted
            run, because without a checkpoint in S3 a new instance does not know how much of the budget is used.
    """
    memory = math.floor((hardware.host_ram_gib or 8) * pod_spec.MEMORY_SHARE)
    gpu: dict[str, Any] = {}
    if hardware.device is not Device.cpu:
        gpu = {"accelerators": f"{hardware.gpu}:{hardware.gpus}" if hardware.gpu else ANY_GPU}
    return {
        "image_id": f"docker:{image}", **gpu, "cpus": "2+", "memory": f"{memory}+", "disk_size": 200, "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 0} | (
            {} if limited else {"recover_on_exit_codes": [Interrupted.exit_code]})}
