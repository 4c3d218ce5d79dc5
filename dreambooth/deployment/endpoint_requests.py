"""Builds the requests for a SageMaker endpoint: model, endpoint configuration, endpoint. No function has side effects.

Every deployment of an endpoint NAME makes a version NAME-v1, NAME-v2 and so on: a model and an endpoint configuration
of this name. SageMaker cannot change either, so an update is a new version, and a rollback is an earlier one. Tags say
which resources belong to the endpoint, what they were made from, and when a version last began to serve.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dreambooth.cloud.secrets import SECRET_VARIABLE
from dreambooth.config.storage import is_remote
from dreambooth.container.hosting import PREFIX
from dreambooth.deployment.options import Deploy, ScaleOn
from dreambooth.errors import UserError

VARIANT = "main"  # the name stays, because autoscaling and alarms refer to it
OWNER_TAG, DIGEST_TAG, SCALING_TAG, SERVED_TAG, SOURCE_TAG = (
    f"dreambooth:{word}" for word in ("endpoint", "digest", "scaling", "served", "source"))
BASE_CHANNEL, ADAPTERS_CHANNEL = "base", "adapters"
ADDITIONAL_FOLDER = "/opt/ml/additional-model-data-sources"  # SageMaker's folder for AdditionalModelDataSources
LONGEST_NAME = 40  # characters of the name of an endpoint, see options.NAME
COMMON_NAMES = re.compile(r"model|output|best|base|(result|checkpoint|step)-\d+")  # folders that every run may have
ASYNC_SECONDS = "3500"  # request_timeout of the server of an asynchronous endpoint; AWS waits 3600 s
# SageMaker gives G4dn, G5 and P4d endpoints NVIDIA driver 470 (CUDA 11.4) unless the request names another AMI. The
# image's PyTorch needs driver 525 or newer (docs/container.md). This AMI has driver 550, with CUDA 12.4.
GPU_AMI = "al2-ami-sagemaker-inference-gpu-3-1"
OWN_AMI = "none"  # inference_ami: that of AWS
BACKLOG_TARGET, CONCURRENCY_TARGET, INVOCATIONS_TARGET = 5.0, 4.0, 20.0  # default scale_target, by what is measured
INVOCATION_SECONDS = {"realtime": 60, "async": 3600}  # longest time of a request that AWS allows


@dataclass(frozen=True)
class Artifact:
    """Where SageMaker reads the model: folders in S3 whose files it copies to the instance one by one."""

    uri: str  # becomes /opt/ml/model
    base: str | None = None  # S3 folder of the base model of an adapter; becomes BASE_CHANNEL in ADDITIONAL_FOLDER
    hub_base: str | None = None  # hub id of the base model, which the container downloads
    adapters: str | None = None  # S3 folder of adapters that requests name; becomes ADAPTERS_CHANNEL
    source: str = ""  # what the user typed, for a tag


@dataclass(frozen=True)
class Scaling:
    """Settings of an endpoint's autoscaling. A tag of each version holds them, so that a rollback restores them."""

    least: int
    greatest: int
    metric: str  # concurrency, invocations or backlog
    target: float
    idle_seconds: int

    def to_tag(self) -> str:
        return f"{self.least}:{self.greatest}:{self.metric}:{self.target:g}:{self.idle_seconds}"

    @classmethod
    def from_tag(cls, text: str) -> "Scaling | None":
        """Return the settings in the value of a tag; None if the value is empty or not known."""
        match = re.fullmatch(r"(\d+):(\d+):(concurrency|invocations|backlog):([\d.e+]+):(\d+)", text)
        return match and cls(int(match[1]), int(match[2]), match[3], float(match[4]), int(match[5]))

    def describe(self) -> str:
        what = {"concurrency": "{:g} requests at a time per instance", "invocations":
                "{:g} requests per minute and instance", "backlog": "{:g} waiting requests per instance"}[self.metric]
        return f"{self.least} to {self.greatest} instances, at {what.format(self.target)}"


@dataclass(frozen=True)
class Version:
    """A version to be made: its requests without names, and the digest that identifies what they ask for."""

    model: dict[str, Any]
    config: dict[str, Any]
    scaling: Scaling | None
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of twelve hex digits over everything but names and tags. A repeated command makes the same digest."""
        content = [{key: value for key, value in part.items() if key != "Tags"} for part in (self.model, self.config)]
        text = json.dumps([*content, self.scaling and self.scaling.to_tag()], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]

    def named(self, endpoint: str, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the requests of CreateModel and CreateEndpointConfig for version `number` of an endpoint."""
        name = version_name(endpoint, number)
        own = {**self.tags, OWNER_TAG: endpoint, DIGEST_TAG: self.digest}
        scaling = {SCALING_TAG: self.scaling.to_tag()} if self.scaling else {}
        model = {**self.model, "ModelName": name, "Tags": merge_tags(self.model, own)}
        config = {**self.config, "EndpointConfigName": name, "Tags": merge_tags(self.config, own | scaling)}
        config["ProductionVariants"] = [{**variant, "ModelName": name} for variant in config["ProductionVariants"]]
        return model, config


def version_name(endpoint: str, number: int) -> str:
    """Return the name of the model and of the endpoint configuration of a version."""
    return f"{endpoint}-v{number}"


def version_number(endpoint: str, name: str) -> int | None:
    """Return the number of a version from the name of its model or configuration; None if it is no such name."""
    match = re.fullmatch(rf"{re.escape(endpoint)}-v([1-9]\d{{0,8}})", name)
    return match and int(match[1])


def endpoint_name(run: str) -> str:
    """Return the default name of the endpoint of a model: the name of its local folder, or its registered name.

    The name ends with a hash if the characters that SageMaker allows do not hold the whole name.

    Raises:
        UserError: the address does not tell the model from others, whose endpoint would be replaced or deleted.
    """
    registered = re.fullmatch(r"models:/+([^/@]+)(?:@[^/]+|/\d+)", run)
    words = registered[1] if registered else Path(run).absolute().as_posix().removesuffix("/model").rpartition("/")[2]
    if not registered and (is_remote(run) or run.startswith("models:") or COMMON_NAMES.fullmatch(words)):
        raise UserError(f"run={run} does not tell which endpoint is meant, because other models have addresses with "
                        "the same end: type name=NAME")
    name = re.sub(r"[^a-zA-Z0-9]+", "-", words).strip("-")
    if words.isascii() and 0 < len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME - 9] or 'dreambooth'}-{sha256(words.encode()).hexdigest()[:8]}".replace("--", "-")


def default_name(run: str) -> str:
    """Return the name of the uploaded folder of a model: the last part of its address, in the characters of names."""
    words = run.rstrip("/").removesuffix("/model").rpartition("/")[2].partition("@")[0]
    return re.sub(r"[^a-zA-Z0-9]+", "-", words).strip("-")[:LONGEST_NAME].rstrip("-") or "dreambooth"


def merge_tags(request: Mapping[str, Any], tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the tags of a request, with further tags added."""
    merged = {tag["Key"]: tag["Value"] for tag in request.get("Tags", ())} | dict(tags)
    return [{"Key": key, "Value": value} for key, value in merged.items()]


def build_scaling(options: Deploy) -> Scaling | None:
    """Return the settings of autoscaling; None if the options ask for none."""
    if (limits := options.scaling) is None:
        return None
    metric = "backlog" if options.is_async else options.scale_on.value
    default = {"backlog": BACKLOG_TARGET, ScaleOn.concurrency.value: CONCURRENCY_TARGET,
               ScaleOn.invocations.value: INVOCATIONS_TARGET}[metric]
    return Scaling(*limits, metric, options.scale_target or default, options.idle_minutes * 60)


def build_version(options: Deploy, artifact: Artifact, instance_type: str, has_own_disk: bool, has_gpu: bool,
                  defaults: Sequence[Mapping[str, Any]] = ({}, {}), memory: Sequence[str] | None = None) -> Version:
    """Return the requests of a version of an endpoint.

    Args:
        options: the options of the command; image and role are set, or the role is in the defaults.
        has_own_disk: whether the instance has a disk of its own, for which SageMaker accepts no volume and no key.
        has_gpu: whether the instance has a GPU, so that its driver matters.
        defaults: sections Model and EndpointConfig of the SageMaker SDK's defaults files, without tags.
        memory: memory options with which pictures of the option `size` fit; None: unknown, so that the server chooses.
    """
    model_defaults, config_defaults = defaults
    found = {BASE_CHANNEL: artifact.base, ADAPTERS_CHANNEL: artifact.adapters}
    channels = {name: uri for name, uri in found.items() if uri}
    server = {name: f"{ADDITIONAL_FOLDER}/{name}" for name in channels}  # options of the server
    if artifact.hub_base:
        server["base"] = artifact.hub_base
    if options.is_async:
        server["request_timeout"] = ASYNC_SECONDS
    if options.sides:
        width, height = options.sides
        server |= {"max_side": str(max(width, height)), "max_pixels": str(width * height)}
        if memory is not None:
            server["memory_options"] = f"[{','.join(memory)}]"
    environment = {**{PREFIX + key.upper(): value for key, value in server.items()},
                   **({SECRET_VARIABLE: options.secret} if options.secret else {}), **options.environment}
    container: dict[str, Any] = {"Image": options.image, "ModelDataSource": _prefix(artifact.uri),
                                 "Environment": {key: str(value) for key, value in environment.items()}}
    if channels:
        container["AdditionalModelDataSources"] = [
            {"ChannelName": name, **_prefix(uri)} for name, uri in channels.items()]
    model: dict[str, Any] = {"PrimaryContainer": container,
                             "ExecutionRoleArn": options.role or model_defaults.get("ExecutionRoleArn", "")}
    if options.subnets:
        model["VpcConfig"] = {"Subnets": [*options.subnets], "SecurityGroupIds": [*options.security_groups]}
    elif vpc := model_defaults.get("VpcConfig"):
        model["VpcConfig"] = vpc
    if model_defaults.get("EnableNetworkIsolation"):
        model["EnableNetworkIsolation"] = True
    variant: dict[str, Any] = {
        "VariantName": VARIANT, "InitialInstanceCount": options.instances, "InstanceType": instance_type,
        "InitialVariantWeight": 1.0, "ModelDataDownloadTimeoutInSeconds": options.download_minutes * 60,
        "ContainerStartupHealthCheckTimeoutInSeconds": options.startup_minutes * 60}
    ami = options.inference_ami or (GPU_AMI if has_gpu else OWN_AMI)
    if ami != OWN_AMI:
        variant["InferenceAmiVersion"] = ami
    if options.volume_gib and not has_own_disk:
        variant["VolumeSizeInGB"] = options.volume_gib
    config: dict[str, Any] = {"ProductionVariants": [variant]}
    key = options.kms_key or config_defaults.get("KmsKeyId")
    if key and not has_own_disk:
        config["KmsKeyId"] = key
    if options.is_async:
        config["AsyncInferenceConfig"] = _async_config(options, config_defaults)
    tags = {**options.tags, **({SOURCE_TAG: tag_value(artifact.source)} if artifact.source else {})}
    return Version(model, config, build_scaling(options), tags)


def _async_config(options: Deploy, defaults: Mapping[str, Any]) -> dict[str, Any]:
    folder = f"{(options.s3 or '').rstrip('/')}/answers/{options.name}"
    output: dict[str, Any] = {"S3OutputPath": folder, "S3FailurePath": f"{folder}/failures"}
    key = options.kms_key or answers_key(defaults)
    if key:
        output["KmsKeyId"] = key
    topics = {"SuccessTopic": options.success_topic, "ErrorTopic": options.error_topic}
    if notify := {name: topic for name, topic in topics.items() if topic}:
        output["NotificationConfig"] = notify
    return {"ClientConfig": {"MaxConcurrentInvocationsPerInstance": options.concurrent}, "OutputConfig": output}


def answers_key(config: Mapping[str, Any]) -> str | None:
    """Return the KMS key of the answers of an asynchronous endpoint in an endpoint configuration."""
    key: str | None = config.get("AsyncInferenceConfig", {}).get("OutputConfig", {}).get("KmsKeyId")
    return key


def build_endpoint(endpoint: str, config: str, tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the request of CreateEndpoint."""
    return {"EndpointName": endpoint, "EndpointConfigName": config,
            "Tags": merge_tags({}, {**tags, OWNER_TAG: endpoint})}


def build_update(endpoint: str, config: str, options: Deploy, keeps_instances: bool) -> dict[str, Any]:
    """Return the request of UpdateEndpoint: a new fleet is started, and receives the traffic when it answers.

    Args:
        keeps_instances: whether the number of instances stays as autoscaling has set it. Otherwise the new fleet
            begins with the number in the configuration.
    """
    request: dict[str, Any] = {"EndpointName": endpoint, "EndpointConfigName": config}
    if keeps_instances:
        request["RetainAllVariantProperties"] = True
    if not options.rollback_alarms and options.canary_percent is None:
        return request  # SageMaker's default: blue/green, all traffic at once
    traffic: dict[str, Any] = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": options.bake_minutes * 60}
    if options.canary_percent is not None:
        traffic |= {"Type": "CANARY", "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": options.canary_percent}}
    deployment: dict[str, Any] = {"BlueGreenUpdatePolicy": {
        "TrafficRoutingConfiguration": traffic,
        "MaximumExecutionTimeoutInSeconds": min(28800, max(600, round(options.timeout_minutes * 60)))}}
    if options.rollback_alarms:
        deployment["AutoRollbackConfiguration"] = {
            "Alarms": [{"AlarmName": alarm} for alarm in options.rollback_alarms]}
    return request | {"DeploymentConfig": deployment}


def tag_value(text: str) -> str:
    """Return a text with only characters that AWS allows in the value of a tag, and at most 256 of them."""
    return re.sub(r"[^\w\s.:/=+\-@]", "_", text)[:256]


def _prefix(uri: str) -> dict[str, Any]:
    return {"S3DataSource": {"S3Uri": uri.rstrip("/") + "/", "S3DataType": "S3Prefix", "CompressionType": "None"}}
