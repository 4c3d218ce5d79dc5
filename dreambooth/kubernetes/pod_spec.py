"""What every pod has: a card where it needs one, a node that has it, the volume of runs, credentials by reference."""

import math
from typing import Any

from dreambooth.config.enums import Device
from dreambooth.config.hardware import Hardware

CLAIM = "dreambooth-runs"  # the PersistentVolumeClaim: runs, class images, what the hub sent
RUNS = "/runs"  # where it is mounted
WORKSPACE = "/kfp-workspace"  # the same, of a pipeline
ACCOUNT = "dreambooth"  # ServiceAccount of workflow pods
SETTINGS, SECRETS = "dreambooth", "dreambooth-secrets"  # ConfigMap and Secret, either of which may be missing
SETTING_KEYS = ("MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION")
SECRET_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
               "AWS_SESSION_TOKEN")
USER = 1000  # the image's user
SAVING = 120  # seconds between SIGTERM and SIGKILL, as SageMaker has it
GPU = "nvidia.com/gpu"
MEMORY = 0.75  # of the host's, since the node keeps some for itself
LITTLE = {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "6Gi"}}  # a step without a card


def resources(hardware: Hardware, cards: int = 1) -> dict[str, Any]:
    """Requests and limits of a pod that trains. Quantities are texts."""
    memory = f"{math.floor((hardware.host_ram_gib or 8) * MEMORY)}Gi"
    found: dict[str, Any] = {"requests": {"cpu": "2", "memory": memory}, "limits": {"memory": memory}}
    if hardware.device is not Device.cpu:
        found["limits"][GPU] = str(cards)
    return found


def placement(hardware: Hardware) -> dict[str, Any]:
    """Node selector and tolerations: nodes with cards are usually tainted with the resource's name."""
    if hardware.device is Device.cpu:
        return {}
    found: dict[str, Any] = {"tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]}
    return {"nodeSelector": dict(hardware.node_selector), **found} if hardware.node_selector else found


def security() -> dict[str, Any]:
    """Of a pod: not root, and the volume is the user's."""
    return {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"}}


def volumes() -> list[dict[str, Any]]:
    return [{"name": "runs", "persistentVolumeClaim": {"claimName": CLAIM}}]


def mounts() -> list[dict[str, Any]]:
    return [{"name": "runs", "mountPath": RUNS}]


def environment() -> list[dict[str, Any]]:
    """A base from the hub is fetched once, into the volume."""
    return [{"name": "HF_HOME", "value": f"{RUNS}/huggingface"}]


def named() -> list[dict[str, Any]]:
    """The same settings and credentials one by one, for what takes no `envFrom`."""
    sources = dict.fromkeys(SETTING_KEYS, ("configMapKeyRef", SETTINGS)) | dict.fromkeys(
        SECRET_KEYS, ("secretKeyRef", SECRETS))
    return [{"name": key, "valueFrom": {kind: {"name": name, "key": key, "optional": True}}}
            for key, (kind, name) in sources.items()]


def references() -> list[dict[str, Any]]:
    """MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, AWS_DEFAULT_REGION and the like, where they are set."""
    return [{"configMapRef": {"name": SETTINGS, "optional": True}},
            {"secretRef": {"name": SECRETS, "optional": True}}]


def container(image: str, command: list[str], args: list[str]) -> dict[str, Any]:
    """Image, words, credentials and the volume."""
    return {"image": image, "command": command, "args": args, "env": environment(), "envFrom": references(),
            "volumeMounts": mounts()}
