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
    upload = () if any(override.startswith("storage.upload=") for override in spec.overrides) else UPLOAD
    overrides = " ".join(map(quote, [*spec.overrides, *upload, TRACKING_OVERRIDE, "run_root=runs"]))
    return {
        "name": "dreambooth", "num_nodes": 1, "resources": _resources(spec.hardware, spec.image),
        "run": RUN.format(overrides=overrides, port=PORT)}


def _resources(hardware: Hardware, image: str) -> dict[str, Any]:
    """Return the instance: the image, the GPU, and at least the host memory that a pod would get."""
    memory = math.floor((hardware.host_ram_gib or 8) * pod_spec.MEMORY_SHARE)
    gpu: dict[str, Any] = {}
    if hardware.device is not Device.cpu:
        gpu = {"accelerators": f"{hardware.gpu}:{hardware.gpus}" if hardware.gpu else ANY_GPU}
    return {
        "image_id": f"docker:{image}", **gpu, "cpus": "2+", "memory": f"{memory}+", "disk_size": 200, "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [Interrupted.exit_code]}}
