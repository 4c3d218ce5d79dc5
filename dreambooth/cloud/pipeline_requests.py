"""Describes the steps of a SageMaker Pipeline for a sweep as plain requests, without the SageMaker SDK.

The steps are validate -> one training job per point of the search space -> choose -> register. A request is a dict of
arguments for the service, in which <<NAME>> refers to a value that exists only when the pipeline runs, such as
<<Parameters.RoleArn>>. sagemaker_pipeline.py builds the pipeline from these requests.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dreambooth.cloud.training_job_request import (
    CHANNELS,
    JobSettings,
    build_hyperparameters,
    build_request,
    find_deletions,
)
from dreambooth.config.compose import SearchSpace, name_trial
from dreambooth.config.hardware import Hardware
from dreambooth.config.storage import is_remote, is_single_file
from dreambooth.errors import UserError

EXECUTION = "Execution.PipelineExecutionId"
IMAGE, ROLE, S3, INSTANCE, SMALL_INSTANCE, GROUP = (
    "Image", "RoleArn", "S3Folder", "InstanceType", "ProcessingInstanceType", "ModelPackageGroup")
VALIDATE, CHOOSE, REGISTER = "validate", "choose", "register"
BEST = "Best"  # the property file that the step `choose` writes: <<Best.model>>
BEST_FILE = "best.json"
STAGE = ["python", "-m", "dreambooth.stage"]
OUTPUT_MOUNT, RESULTS_MOUNT = "/opt/ml/processing/output", "/opt/ml/processing/input/results"
SMALL_INSTANCE_TYPE, SMALL_VOLUME_GIB, SMALL_STEP_SECONDS = "ml.m5.xlarge", 30, 3600  # for steps without a GPU
JOB_ONLY = ("TrainingJobName", "RetryStrategy")  # parts of a job's request that a pipeline sets by other means


@dataclass(frozen=True)
class SageMakerSpec:
    """The inputs for rendering a pipeline or a tuning job: overrides of every run, search space, machine and image."""

    overrides: tuple[str, ...]
    space: SearchSpace
    hardware: Hardware
    image: str

    def __post_init__(self) -> None:
        for problem in find_deletions(self.overrides):
            raise UserError(problem)

    def require_instance_type(self) -> str:
        """Return the instance type of the jobs. Call it before jobs are submitted; rendering a pipeline needs none.

        Raises:
            UserError: the machine has no SageMaker instance type.
        """
        if self.hardware.instance_type is None:
            raise UserError(f"hardware={self.hardware.name} has no SageMaker instance type: type "
                            "hardware.instance_type=ml.m5.2xlarge")
        return self.hardware.instance_type

    @property
    def settings(self) -> dict[str, str]:
        """The overrides of every run, from key to value."""
        return {key: value for key, _, value in (override.partition("=") for override in self.overrides)}

    @property
    def input_folders(self) -> dict[str, str]:
        """The S3 folders that jobs read through channels, by config key."""
        return {key: value for key, value in self.settings.items()
                if key in CHANNELS and is_remote(value) and not is_single_file(value)}


def reference(name: str) -> str:
    """Return the text that stands for a value of the running pipeline in a request."""
    return f"<<{name}>>"


def parameter(name: str) -> str:
    """Return the text that stands for a parameter of the pipeline in a request."""
    return reference(f"Parameters.{name}")


def parameters(spec: SageMakerSpec) -> dict[str, str | None]:
    """Return the parameters of the pipeline, from name to default; None: each execution must set the parameter.

    Each override with a dot in its key, such as dataset.instance_prompt=..., is a parameter. Overrides without a dot
    choose options of config groups. They determine what is rendered, so they are not parameters.
    """
    return {IMAGE: spec.image, ROLE: None, S3: None, INSTANCE: spec.hardware.instance_type,
            SMALL_INSTANCE: SMALL_INSTANCE_TYPE, GROUP: "dreambooth",
            **{_parameter_name(key): value for key, value in _variable_overrides(spec).items()}}


def training_requests(spec: SageMakerSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the request of each training step. Trials run in the order of Hydra's basic sweeper."""
    overrides = _overrides(spec)
    channels = {CHANNELS[key]: parameter(_parameter_name(key)) for key in spec.input_folders}
    trials = spec.space.trials()
    for number, trial in enumerate(trials, 1):
        name = f"train-{number:0{len(str(len(trials)))}}"
        hyperparameters = build_hyperparameters(
            [*overrides, *trial], channels, reference(EXECUTION), name_trial(trial) or None)
        settings = JobSettings(parameter(IMAGE), parameter(ROLE), parameter(S3), parameter(INSTANCE))
        request = build_request(
            settings, name, reference(EXECUTION), hyperparameters, channels, spec.hardware.disk_gib, None)
        # One folder per step: the SDK's local mode stores an archive of the same name for every step.
        request["OutputDataConfig"]["S3OutputPath"] += f"/{name}"
        yield name, {key: value for key, value in request.items() if key not in JOB_ONLY}


def validate_request(spec: SageMakerSpec) -> dict[str, Any]:
    """Return the request of the step that checks and plans every run, before a GPU is paid for."""
    return _stage_request([VALIDATE, "--out", "/tmp/stage", "--space", spec.space.name, *_overrides(spec)])


def choose_request(local: bool) -> dict[str, Any]:
    """Return the request of the step that chooses the best run by its objective, and writes BEST_FILE.

    Args:
        local: whether the pipeline runs in the SDK's local mode, where containers read results from a mounted folder.
            Otherwise the step reads only the small files that it needs from S3.
    """
    results = f"{parameter(S3)}/{reference(EXECUTION)}"
    request = _stage_request([CHOOSE, "--out", OUTPUT_MOUNT, "--results", RESULTS_MOUNT if local else results])
    if local:
        request["ProcessingInputs"] = [{"InputName": "results", "S3Input": {
            "S3Uri": results, "LocalPath": RESULTS_MOUNT, "S3DataType": "S3Prefix", "S3InputMode": "File"}}]
    request["ProcessingOutputConfig"] = {"Outputs": [{"OutputName": CHOOSE, "S3Output": {
        "S3Uri": f"{results}/{CHOOSE}", "LocalPath": OUTPUT_MOUNT, "S3UploadMode": "EndOfJob"}}]}
    return request


def register_request() -> dict[str, Any]:
    """Return the request of the step that registers the best model, as a version that waits for approval."""
    source = {"S3Uri": reference(f"{BEST}.model"), "S3DataType": "S3Prefix", "CompressionType": "None"}
    return {
        "ModelPackageGroupName": parameter(GROUP), "ModelApprovalStatus": "PendingManualApproval",
        "InferenceSpecification": {
            "Containers": [{"Image": parameter(IMAGE), "ModelDataSource": {"S3DataSource": source}}],
            "SupportedContentTypes": ["application/json"], "SupportedResponseMIMETypes": ["application/json"]},
        "CustomerMetadataProperties": {"objective": reference(f"{BEST}.objective"), "execution": reference(EXECUTION)}}


def _stage_request(arguments: list[str]) -> dict[str, Any]:
    return {
        "AppSpecification": {
            "ImageUri": parameter(IMAGE), "ContainerEntrypoint": STAGE, "ContainerArguments": arguments},
        "ProcessingResources": {"ClusterConfig": {
            "InstanceCount": 1, "InstanceType": parameter(SMALL_INSTANCE), "VolumeSizeInGB": SMALL_VOLUME_GIB}},
        "RoleArn": parameter(ROLE), "StoppingCondition": {"MaxRuntimeInSeconds": SMALL_STEP_SECONDS}}


def _variable_overrides(spec: SageMakerSpec) -> dict[str, str]:
    return {key: value for key, value in spec.settings.items() if "." in key and value}


def _parameter_name(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", key.lstrip("+"))


def _overrides(spec: SageMakerSpec) -> list[str]:
    """Return the overrides of every run. References to parameters replace values that an execution may change."""
    variable = _variable_overrides(spec)
    return [f"{key}={parameter(_parameter_name(key)) if key in variable else value}"
            for key, value in spec.settings.items()]
