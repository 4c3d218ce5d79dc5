"""The request of a SageMaker training job, from a run's overrides and the launcher's settings. Pure.

The contract with the container: hyperparameters are overrides as texts; the channels images, class_images and model
carry what lies in S3; results in /opt/ml/model, training state in /opt/ml/checkpoints, both kept in S3 as they are.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

HERE = {"run_root", "storage.cache"}  # folders of the machine that submits
CHANNELS = {"dataset.instance_dir": "images", "dataset.class_dir": "class_images", "model.source": "model"}
METRICS = {  # read from what the run prints
    "step": r"training (\d+)/\d+ ",
    "loss": r"training .*loss ([0-9.]+)",
}
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"  # as the blog sets it; both spellings are read by PyTorch
SPARE_GIB = 10  # of a volume: the image's own scratch, logs, SageMaker's copies
UNSEEN = ("tracking.", "hardware.price_usd_hour", "hardware.spot_price_usd_hour")  # say nothing of what is trained


@dataclass(frozen=True)
class Settings:
    """How jobs run, as the launcher's conf/ has it; hours, minutes and GiB as a person says them."""

    image: str
    role: str
    s3: str
    instance_type: str
    instance_count: int = 1
    volume_gib: int | None = None
    spot: bool = False
    attempts: int = 3
    max_run_hours: float = 24.0
    max_wait_hours: float = 36.0
    keep_alive_minutes: int = 0
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    kms_key: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    allocator: str | None = None
    mlflow_uri: str | None = None
    mlflow_secret: str | None = None


def name_of(sweep: str, number: int, sent: Mapping[str, str], contents: Mapping[str, str], attempt: int = 0) -> str:
    """A job's name: the same for the same run of the same sweep, from any machine, so that it is never begun twice.

    Args:
        sent: its hyperparameters.
        contents: what is behind the paths that it reads.
    """
    key = sha256(json.dumps([trained(sent), contents], sort_keys=True).encode()).hexdigest()[:8]
    word = re.sub(r"[^a-zA-Z0-9]+", "-", sweep).strip("-")[:40].rstrip("-") or "sweep"
    return f"{word}-{number}-{key}" + (f"-{attempt}" if attempt else "")


def trained(sent: Mapping[str, str]) -> dict[str, str]:
    """The hyperparameters by which two jobs are the same: not where their metrics go, nor prices."""
    return {key: value for key, value in sent.items() if not key.lstrip("+").startswith(UNSEEN)}


def request(settings: Settings, name: str, sweep: str, sent: Mapping[str, str], inputs: Mapping[str, str],
            disk_gib: float | None, needed_gib: float | None, first: str | None = None) -> dict[str, Any]:
    """CreateTrainingJob's arguments.

    Args:
        sent: hyperparameters.
        inputs: channel -> folder in S3.
        disk_gib: the instance's own disk, None if it has none or that is unknown.
        needed_gib: what the run will write, by the planner; None: unknown.
        first: the name under which the run was begun first, whose checkpoints it goes on from; None: this is the first.
    """
    place = f"{settings.s3.rstrip('/')}/{sweep}"
    kms = {"KmsKeyId": settings.kms_key} if settings.kms_key else {}
    asked: dict[str, Any] = {
        "TrainingJobName": name,
        "RoleArn": settings.role,
        "AlgorithmSpecification": {
            "TrainingImage": settings.image, "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": key, "Regex": regex} for key, regex in METRICS.items()]},
        "HyperParameters": dict(sent),
        "OutputDataConfig": {"S3OutputPath": place, "CompressionType": "NONE", **kms},
        "CheckpointConfig": {"S3Uri": f"{place}/{first or name}/checkpoints", "LocalPath": "/opt/ml/checkpoints"},
        "ResourceConfig": _resources(settings, disk_gib, needed_gib),
        "StoppingCondition": {"MaxRuntimeInSeconds": round(settings.max_run_hours * 3600)},
        "Environment": _environment(settings, sweep),
        "Tags": [{"Key": key, "Value": value} for key, value in {
            "dreambooth:sweep": sweep, **settings.tags}.items()],
    }
    if inputs:
        asked["InputDataConfig"] = [_channel(*item) for item in sorted(inputs.items())]
    if settings.spot:
        asked["EnableManagedSpotTraining"] = True
        asked["StoppingCondition"]["MaxWaitTimeInSeconds"] = round(
            max(settings.max_wait_hours, settings.max_run_hours) * 3600)
    if settings.attempts:
        asked["RetryStrategy"] = {"MaximumRetryAttempts": settings.attempts}
    if settings.subnets:
        asked["VpcConfig"] = {"Subnets": list(settings.subnets), "SecurityGroupIds": list(settings.security_groups)}
    return asked


def hyperparameters(overrides: Sequence[str], channels: Collection[str], sweep: str, run_name: str | None = None,
                    mlflow_uri: str | None = None) -> dict[str, str]:
    """Overrides as key and value, without those that a channel stands for."""
    carried = {key for key, channel in CHANNELS.items() if channel in channels}
    dropped = HERE | carried | ({"dataset"} if "images" in channels else set())
    asked = {"tracking.sweep": sweep}
    if run_name:
        asked["tracking.run_name"] = run_name
    if mlflow_uri:
        asked["tracking.uri"] = "${oc.env:MLFLOW_TRACKING_URI}"
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") not in dropped:
            asked[key] = value
    return asked


def only_here(uri: str) -> bool:
    """Whether an MLflow address means something on the machine that submits alone: its files, its loopback."""
    parts = urlsplit(uri)
    host = parts.hostname or ""
    if host in ("localhost", "::1", "0.0.0.0", "host.docker.internal") or host.startswith("127."):
        return True
    return parts.scheme in ("", "file", "sqlite") and uri != "databricks"


def _channel(channel: str, uri: str) -> dict[str, Any]:
    return {"ChannelName": channel, "InputMode": "File", "DataSource": {"S3DataSource": {
        "S3DataType": "S3Prefix", "S3Uri": uri.rstrip("/") + "/", "S3DataDistributionType": "FullyReplicated"}}}


def _resources(settings: Settings, disk_gib: float | None, needed_gib: float | None) -> dict[str, Any]:
    volume = settings.volume_gib or math.ceil((100 if needed_gib is None else needed_gib) + SPARE_GIB)
    if disk_gib is not None:  # instances with a disk of their own use it, and refuse a larger volume
        volume = min(volume, int(disk_gib))
    found: dict[str, Any] = {"InstanceType": settings.instance_type, "InstanceCount": settings.instance_count,
                             "VolumeSizeInGB": volume}
    if settings.kms_key and disk_gib is None:  # a disk of its own is encrypted by the machine
        found["VolumeKmsKeyId"] = settings.kms_key
    if settings.keep_alive_minutes:
        found["KeepAlivePeriodInSeconds"] = settings.keep_alive_minutes * 60
    return found


def _environment(settings: Settings, sweep: str) -> dict[str, str]:
    found = {"DREAMBOOTH_SWEEP": sweep, ALLOCATOR: settings.allocator, "MLFLOW_TRACKING_URI": settings.mlflow_uri,
             "DREAMBOOTH_SECRET": settings.mlflow_secret, **settings.environment}
    return {key: str(value) for key, value in found.items() if value is not None}
