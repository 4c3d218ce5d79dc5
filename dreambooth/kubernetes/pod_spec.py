"""Builds the parts of a pod that all workflow files share: GPU, node selector, volume, settings and credentials."""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dreambooth.config.enums import Device
from dreambooth.config.hardware import Hardware
from dreambooth.errors import Diverged, DoesNotFit, OutOfMemory, UserError

CLAIM = "dreambooth-runs"  # PersistentVolumeClaim with runs, class images and downloads from the hub
RUNS_MOUNT = "/runs"  # mount path of the volume of CLAIM
KFP_WORKSPACE = "/kfp-workspace"  # mount path of the workspace of a Kubeflow pipeline
SERVICE_ACCOUNT = "dreambooth"  # service account of workflow pods
CONFIG_MAP, SECRET = "dreambooth", "dreambooth-secrets"  # names; both objects are optional
CONFIG_MAP_KEYS = ("MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION")
SECRET_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
               "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY")
USER_ID = 1000  # user of the container image
# Exit codes of failures that would occur again in a retry.
FATAL_EXIT_CODES = [error.exit_code for error in (UserError, DoesNotFit, OutOfMemory, Diverged)]
GRACE_PERIOD = 120  # seconds between SIGTERM and SIGKILL, as under SageMaker
GPU_RESOURCE = "nvidia.com/gpu"
GPU_STAGES = ("class-images", "train", "evaluate")  # stages that generate images or train
MEMORY_SHARE = 0.75  # share of host memory for the pod, because the node reserves some memory for itself
SMALL_RESOURCES = {  # resources of a stage without a GPU
    "requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "6Gi"}}


def resources(hardware: Hardware, gpus: int = 1) -> dict[str, Any]:
    """Return the requests and limits of a pod that trains, as Kubernetes quantities (strings)."""
    memory = f"{math.floor((hardware.host_ram_gib or 8) * MEMORY_SHARE)}Gi"
    quantities: dict[str, Any] = {"requests": {"cpu": "2", "memory": memory}, "limits": {"memory": memory}}
    if hardware.device is not Device.cpu:
        quantities["limits"][GPU_RESOURCE] = str(gpus)
    return quantities


def placement(hardware: Hardware) -> dict[str, Any]:
    """Return a pod's node selector and tolerations; {} for hardware without a GPU.

    GPU nodes usually have a taint with the GPU resource's name, so the pod tolerates this taint.
    """
    if hardware.device is Device.cpu:
        return {}
    tolerations = [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}]
    if not hardware.node_selector:
        return {"tolerations": tolerations}
    return {"nodeSelector": dict(hardware.node_selector), "tolerations": tolerations}


def security_context() -> dict[str, Any]:
    """Return a pod's security context. The pod runs as the image's user, who is not root and owns the volume."""
    return {"runAsNonRoot": True, "runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"}}


def volumes() -> list[dict[str, Any]]:
    """Return the list of a pod's volumes. Its only item is the volume for run folders."""
    return [{"name": "runs", "persistentVolumeClaim": {"claimName": CLAIM}}]


def volume_mounts() -> list[dict[str, Any]]:
    """Return the list of a container's volume mounts. Its only item mounts the volume for run folders."""
    return [{"name": "runs", "mountPath": RUNS_MOUNT}]


def env() -> list[dict[str, Any]]:
    """Return the environment variable HF_HOME, which puts the Hugging Face hub cache on the volume for run folders.

    Models are then downloaded only once.
    """
    return [{"name": "HF_HOME", "value": f"{RUNS_MOUNT}/huggingface"}]


def env_from() -> list[dict[str, Any]]:
    """Return references to the ConfigMap with settings and the Secret with credentials. Both objects are optional."""
    return [{"configMapRef": {"name": CONFIG_MAP, "optional": True}},
            {"secretRef": {"name": SECRET, "optional": True}}]


def env_by_key() -> list[dict[str, Any]]:
    """Return references to single keys of the ConfigMap and the Secret that `env_from` refers to as a whole.

    Platforms whose container specification has no field `envFrom` need these references.
    """
    sources = dict.fromkeys(CONFIG_MAP_KEYS, ("configMapKeyRef", CONFIG_MAP)) | dict.fromkeys(
        SECRET_KEYS, ("secretKeyRef", SECRET))
    return [{"name": key, "valueFrom": {kind: {"name": name, "key": key, "optional": True}}}
            for key, (kind, name) in sources.items()]


def escape_variables(text: str) -> str:
    """Escape a text so that Kubernetes passes it to a container as it is.

    In args and environment variables, Kubernetes replaces $$ by $. It replaces $(NAME) by the value of the environment
    variable NAME, which may be a password. A text that Argo, Katib or Kubeflow Pipelines will insert there must be
    escaped, too.
    """
    return re.sub(r"\$\$+|\$(?=\()", lambda match: match[0] * 2, text)


def container(
    image: str, command: list[str], args: list[str], variables: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the specification of a container that has the settings, the credentials and the volume for run folders.

    Args:
        variables: environment variables of this container, in addition to those of all containers.
    """
    own = [{"name": name, "value": escape_variables(value)} for name, value in variables.items()]
    return {"image": image, "command": command, "args": [escape_variables(arg) for arg in args], "env": [*env(), *own],
            "envFrom": env_from(), "volumeMounts": volume_mounts()}
