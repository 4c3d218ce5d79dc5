"""Builds the request of a SageMaker training job from a run's overrides and the launcher's settings.

The functions have no side effects. The contract between job and container is as follows. Hyperparameters are overrides
as strings. A channel is a folder in S3. Its name is `images`, `class_images` or `model`. The container writes results
to /opt/ml/model and training state to /opt/ml/checkpoints. SageMaker copies both folders to S3 file by file.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from dreambooth.runs import pruning
from dreambooth.tracking.mlflow_database import is_local

LOCAL_KEYS = {"run_root", "storage.cache", "train.compile_cache"}  # folders of the submitting machine, not sent to jobs
# Configuration key -> channel that provides the folder.
CHANNELS = {"dataset.instance_dir": "images", "dataset.class_dir": "class_images", "model.source": "model"}
OBJECTIVE = "objective"  # metric: the number that a sweep minimises
NUMBER = r"([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)"
METRICS = {  # metric -> regular expression that matches the output of a run
    "step": r"training (\d+)/\d+ ",
    "loss": rf"training .*loss {NUMBER}",
    OBJECTIVE: rf"objective={NUMBER}",  # the last line of a run
}
REPORTED = {  # the same for jobs of a search that may end them early, see runs/pruning.py
    "reported_step": pruning.LINE.format(r"(\d+)", ""),
    "reported_value": pruning.LINE.format(r"\d+", NUMBER),
}
# The variable that the AWS blog post sets (docs/container.md). PyTorch also reads PYTORCH_ALLOC_CONF.
ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
SPARE_GIB = 10  # added to the volume size for the container's scratch space, logs and SageMaker's copies
# Prefixes of keys that do not affect training.
IGNORED_KEYS = ("tracking.", "hardware.price_usd_hour", "hardware.spot_price_usd_hour")


def find_deletions(overrides: Collection[str]) -> list[str]:
    """Return one sentence for each override that deletes a key."""
    return [f"{override} deletes a key, which hyperparameters cannot express: leave it out"
            for override in overrides if override.startswith("~")]


@dataclass(frozen=True)
class JobSettings:
    """The launcher's settings for a job. conf/hydra/launcher/sagemaker.yaml explains each setting."""

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


def build_hyperparameters(overrides: Sequence[str], channels: Collection[str], sweep: str, run_name: str | None = None,
                          mlflow_uri: str | None = None) -> dict[str, str]:
    """Return the hyperparameters of a job: one per override, plus the tracking settings.

    Overrides of LOCAL_KEYS (folders on the submitting machine), and of keys that a channel sets, are left out.

    Args:
        channels: names of the job's channels.
    """
    replaced = {key for key, channel in CHANNELS.items() if channel in channels}
    dropped = LOCAL_KEYS | replaced | ({"dataset"} if "images" in channels else set())
    hyperparameters = {"tracking.sweep": sweep}
    if run_name:
        hyperparameters["tracking.run_name"] = run_name
    if mlflow_uri:
        hyperparameters["tracking.uri"] = "${oc.env:MLFLOW_TRACKING_URI}"
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") not in dropped:
            hyperparameters[key] = value
    return hyperparameters


def job_name(sweep: str, number: int, hyperparameters: Mapping[str, str], contents: Mapping[str, str],
             attempt: int = 0) -> str:
    """Return the name of a job. Jobs for the same run get the same name on every machine, so no run is started twice.

    Args:
        number: number of the job in the sweep.
        contents: digests of the folders and files that the run reads.
        attempt: 0 for the first attempt; greater than 0 if the job is run again after a failure.
    """
    identity = [identifying_hyperparameters(hyperparameters), contents]
    key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    word = re.sub(r"[^a-zA-Z0-9]+", "-", sweep).strip("-")[:40].rstrip("-") or "sweep"
    return f"{word}-{number}-{key}" + (f"-{attempt}" if attempt else "")


def identifying_hyperparameters(hyperparameters: Mapping[str, str]) -> dict[str, str]:
    """Return the hyperparameters that identify a run: all except the tracking settings and the hardware's prices."""
    return {key: value for key, value in hyperparameters.items() if not key.lstrip("+").startswith(IGNORED_KEYS)}


def build_request(settings: JobSettings, name: str, sweep: str, hyperparameters: Mapping[str, str],
                  inputs: Mapping[str, str], disk_gib: float | None, needed_gib: float | None,
                  first_name: str | None = None) -> dict[str, Any]:
    """Return the arguments for a call of SageMaker's CreateTrainingJob.

    Args:
        inputs: S3 folder of each channel, by channel name.
        disk_gib: size of the instance's own disk; None: the instance has no disk of its own, or the size is unknown.
        needed_gib: the planner's estimate of the data that the run will write; None: unknown.
        first_name: name of the job that was the first attempt at this run. The new job resumes from the checkpoints of
            the first attempt. None: the new job is the first attempt.
    """
    output = f"{settings.s3.rstrip('/')}/{sweep}"
    kms = {"KmsKeyId": settings.kms_key} if settings.kms_key else {}
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "RoleArn": settings.role,
        "AlgorithmSpecification": {
            "TrainingImage": settings.image, "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": key, "Regex": regex} for key, regex in (
                METRICS | (REPORTED if pruning.VARIABLE in settings.environment else {})).items()]},
        "HyperParameters": dict(hyperparameters),
        "OutputDataConfig": {"S3OutputPath": output, "CompressionType": "NONE", **kms},
        "CheckpointConfig": {"S3Uri": f"{output}/{first_name or name}/checkpoints", "LocalPath": "/opt/ml/checkpoints"},
        "ResourceConfig": _resources(settings, disk_gib, needed_gib),
        "StoppingCondition": {"MaxRuntimeInSeconds": round(settings.max_run_hours * 3600)},
        "Environment": _environment(settings, sweep),
        "Tags": [{"Key": key, "Value": value} for key, value in {
            "dreambooth:sweep": sweep, **settings.tags}.items()],
    }
    if inputs:
        request["InputDataConfig"] = [_channel(*item) for item in sorted(inputs.items())]
    if settings.spot:
        request["EnableManagedSpotTraining"] = True
        request["StoppingCondition"]["MaxWaitTimeInSeconds"] = round(
            max(settings.max_wait_hours, settings.max_run_hours) * 3600)
    if settings.attempts:
        request["RetryStrategy"] = {"MaximumRetryAttempts": settings.attempts}
    if settings.subnets:
        request["VpcConfig"] = {"Subnets": list(settings.subnets), "SecurityGroupIds": list(settings.security_groups)}
    return request


def is_local_uri(uri: str) -> bool:
    """Return whether an MLflow URI is valid only on the submitting machine.

    These are the URIs of files, of SQLite databases and of loopback hosts.
    """
    host = urlsplit(uri).hostname or ""
    if host in ("localhost", "::1", "0.0.0.0", "host.docker.internal") or host.startswith("127."):
        return True
    return is_local(uri)


def _channel(channel: str, uri: str) -> dict[str, Any]:
    return {"ChannelName": channel, "InputMode": "File", "DataSource": {"S3DataSource": {
        "S3DataType": "S3Prefix", "S3Uri": uri.rstrip("/") + "/", "S3DataDistributionType": "FullyReplicated"}}}


def _resources(settings: JobSettings, disk_gib: float | None, needed_gib: float | None) -> dict[str, Any]:
    volume = settings.volume_gib or math.ceil((100 if needed_gib is None else needed_gib) + SPARE_GIB)
    if disk_gib is not None:  # an instance with its own disk uses this disk, and rejects a larger volume
        volume = min(volume, int(disk_gib))
    resources: dict[str, Any] = {"InstanceType": settings.instance_type, "InstanceCount": settings.instance_count,
                                 "VolumeSizeInGB": volume}
    if settings.kms_key and disk_gib is None:  # the instance itself encrypts its own disk
        resources["VolumeKmsKeyId"] = settings.kms_key
    if settings.keep_alive_minutes:
        resources["KeepAlivePeriodInSeconds"] = settings.keep_alive_minutes * 60
    return resources


def _environment(settings: JobSettings, sweep: str) -> dict[str, str]:
    environment = {"DREAMBOOTH_SWEEP": sweep, ALLOCATOR_VARIABLE: settings.allocator,
                   "MLFLOW_TRACKING_URI": settings.mlflow_uri, "DREAMBOOTH_SECRET": settings.mlflow_secret,
                   **settings.environment}
    return {key: str(value) for key, value in environment.items() if value is not None}
