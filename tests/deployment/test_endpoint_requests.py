"""Requests of endpoints equal the golden files, and botocore's models of the services allow them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dreambooth.cloud import request_validation
from dreambooth.deployment import scaling as scaling_requests
from dreambooth.deployment.defaults import Defaults
from dreambooth.deployment.endpoint_requests import (
    GPU_AMI,
    Artifact,
    Scaling,
    build_endpoint,
    build_update,
    build_version,
    default_name,
    endpoint_name,
    tag_value,
    version_number,
)
from dreambooth.deployment.options import NAME, Action, Deploy, ScaleOn
from dreambooth.deployment.sagemaker_deployment import open_deployment
from dreambooth.deployment.serving_need import read_server_options
from dreambooth.errors import UserError
from dreambooth.serving.options import Serve
from dreambooth.storage import folders
from tests.cloud.jobs import GOLDEN
from tests.deployment.conftest import OPTIONS

MODEL = Artifact("s3://bucket/dreambooth/models/toy-0123456789", source="runs/toy")
ADAPTER = Artifact("s3://bucket/dreambooth/models/toy-0123456789", "s3://bucket/dreambooth/models/sd15-0123456789",
                   adapters="s3://bucket/adapters")
TOPIC = "arn:aws:sns:us-east-1:123456789012:pictures"
KEY = "arn:aws:kms:us-east-1:123456789012:key/1"
CASES: dict[str, tuple[dict[str, Any], Artifact]] = {
    "realtime": ({"max_instances": 4, "rollback_alarms": ["errors"], "canary_percent": 25, "secret": "hub",
                  "subnets": ["subnet-0123456789abcdef0"], "security_groups": ["sg-0123456789abcdef0"],
                  "tags": {"team": "art"}}, MODEL),
    "async": ({"kind": "async", "max_instances": 2, "success_topic": TOPIC, "error_topic": TOPIC, "kms_key": KEY},
              ADAPTER),
    "invocations": ({"max_instances": 2, "scale_on": ScaleOn.invocations, "environment": {"LEVEL": 1}}, MODEL)}
SERVICES = {"CreateModel": "sagemaker", "CreateEndpointConfig": "sagemaker", "CreateEndpoint": "sagemaker",
            "UpdateEndpoint": "sagemaker", "RegisterScalableTarget": "application-autoscaling",
            "PutScalingPolicy": "application-autoscaling", "PutScalingPolicy (wake)": "application-autoscaling",
            "PutMetricAlarm": "cloudwatch"}


def requests_of(name: str) -> dict[str, dict[str, Any]]:
    words, artifact = CASES[name]
    options = Deploy(**OPTIONS | words)
    version = build_version(options, artifact, "ml.g5.xlarge", has_own_disk=True, has_gpu=True)
    model, config = version.named("toy", 3)
    scaling = version.scaling
    assert scaling is not None
    requests = {
        "CreateModel": model, "CreateEndpointConfig": config,
        "CreateEndpoint": build_endpoint("toy", "toy-v3", version.tags),
        "UpdateEndpoint": build_update("toy", "toy-v3", options, keeps_instances=not options.is_async),
        "RegisterScalableTarget": scaling_requests.build_target("toy", scaling, is_new=True),
        "PutScalingPolicy": scaling_requests.build_policy("toy", scaling)}
    if options.is_async:
        arn = "arn:aws:autoscaling:us-east-1:123456789012:scalingPolicy:1:policyName/dreambooth-toy-wake"
        requests |= {"PutScalingPolicy (wake)": scaling_requests.build_wake_policy("toy"),
                     "PutMetricAlarm": scaling_requests.build_wake_alarm("toy", arn)}
    return requests


@pytest.mark.parametrize("name", CASES)
def test_the_requests_equal_the_golden_file(name: str) -> None:
    text = json.dumps(requests_of(name), indent=1, sort_keys=True) + "\n"
    path = GOLDEN / f"endpoint-{name}.json"
    if os.environ.get("DREAMBOOTH_WRITE_GOLDEN") and not os.environ.get("CI"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("name", CASES)
def test_botocores_models_allow_the_golden_requests(name: str) -> None:
    for operation, request in json.loads((GOLDEN / f"endpoint-{name}.json").read_text()).items():
        service = folders.client(SERVICES[operation]).meta.service_model
        shape = service.operation_model(operation.partition(" ")[0]).input_shape
        assert list(request_validation.find_problems(request, shape)) == [], operation


def test_the_driver_of_the_instances_suits_the_image() -> None:
    """SageMaker's own default for G4dn, G5 and P4d is driver 470; the image's PyTorch needs 525."""
    def ami(has_gpu: bool, **words: Any) -> Any:
        version = build_version(Deploy(**OPTIONS | words), MODEL, "ml.g5.xlarge", True, has_gpu)
        return version.config["ProductionVariants"][0].get("InferenceAmiVersion")

    assert [ami(True), ami(False), ami(True, inference_ami="none")] == [GPU_AMI, None, None]
    assert ami(True, inference_ami="al2-ami-sagemaker-inference-gpu-2-1") == "al2-ami-sagemaker-inference-gpu-2-1"


def test_the_server_gets_the_size_for_which_the_instance_was_chosen() -> None:
    """Otherwise it would refuse pictures of this size, and plan its memory for the resolution of the model."""
    def environment(memory: tuple[str, ...] | None = ("vae_tiling", "int8"), **words: Any) -> Any:
        version = build_version(Deploy(**OPTIONS | words), MODEL, "ml.g5.xlarge", True, True, memory=memory)
        found = version.model["PrimaryContainer"]["Environment"]
        assert isinstance(read_server_options(found), Serve)
        return {key.removeprefix("DREAMBOOTH_SERVE_"): value for key, value in found.items()}

    assert environment() == {} == environment(memory=None)
    assert environment(size="1024x1536") == {
        "MAX_SIDE": "1536", "MAX_PIXELS": "1572864", "MEMORY_OPTIONS": "[vae_tiling,int8]"}
    assert environment((), size="64x64")["MEMORY_OPTIONS"] == "[]"
    assert "MEMORY_OPTIONS" not in environment(None, size="64x64"), "the planner does not know: the server may"
    typed = {"DREAMBOOTH_SERVE_MEMORY_OPTIONS": "auto", "DREAMBOOTH_SERVE_MAX_SIDE": "512"}
    assert environment(size="64x64", environment=typed) == {
        "MAX_SIDE": "512", "MAX_PIXELS": "4096", "MEMORY_OPTIONS": "auto"}
    with pytest.raises(ValueError, match="size must be WIDTHxHEIGHT in pixels, 8 or more"):
        Deploy(size="0x64")


def test_the_digest_is_that_of_the_content_and_not_of_names_and_tags() -> None:
    def digest(artifact: Artifact = MODEL, **words: Any) -> str:
        return build_version(Deploy(**OPTIONS | words), artifact, "ml.g5.xlarge", True, True).digest

    assert digest() == digest(tags={"team": "art"})
    assert len({digest(), digest(ADAPTER), digest(max_instances=2), digest(environment={"A": "1"}),
                digest(instances=2), digest(image="other")}) == 6


def test_disks_and_keys_follow_the_instance() -> None:
    """An instance with a disk of its own encrypts it itself, and accepts neither a volume nor a key for it."""
    options = Deploy(**OPTIONS | {"kms_key": KEY, "volume_gib": 50})
    for own_disk in (True, False):
        config = build_version(options, MODEL, "ml.x", own_disk, True).config
        assert ("KmsKeyId" in config, "VolumeSizeInGB" in config["ProductionVariants"][0]) == (not own_disk,) * 2


def test_defaults_of_the_company_are_used_unless_an_option_replaces_them() -> None:
    vpc = {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    defaults = ({"ExecutionRoleArn": "theirs", "VpcConfig": vpc, "EnableNetworkIsolation": True}, {"KmsKeyId": KEY})
    version = build_version(Deploy(**OPTIONS | {"role": None}), MODEL, "ml.x", False, True, defaults)
    assert (version.model["ExecutionRoleArn"], version.model["VpcConfig"]) == ("theirs", vpc)
    assert (version.model["EnableNetworkIsolation"], version.config["KmsKeyId"]) == (True, KEY)
    options = Deploy(**OPTIONS | {"subnets": ["subnet-2"], "security_groups": ["sg-2"], "kms_key": "mine"})
    version = build_version(options, MODEL, "ml.x", False, True, defaults)
    assert version.model["ExecutionRoleArn"] == OPTIONS["role"] and version.config["KmsKeyId"] == "mine"
    assert version.model["VpcConfig"]["Subnets"] == ["subnet-2"]


def test_only_defaults_that_are_used_are_told() -> None:
    output = {"S3OutputPath": "s3://theirs/answers", "KmsKeyId": "answers"}
    company = Defaults({"ExecutionRoleArn": "theirs", "Tags": [{"Key": "team", "Value": "art"}]},
                       {"KmsKeyId": KEY, "AsyncInferenceConfig": {"OutputConfig": output}}, {})

    def told(own_disk: bool, **words: Any) -> list[str]:
        defaults = company.model, company.config
        version = build_version(Deploy(**OPTIONS | words), MODEL, "ml.x", own_disk, True, defaults)
        lines = company.describe(company.add_tags(version))
        return [line.removeprefix("from the defaults of the SageMaker SDK: ") for line in lines]

    assert told(True) == ["Tags.team=art"]
    assert told(False, role=None, tags={"team": "sales"}) == ["ExecutionRoleArn=theirs", f"KmsKeyId={KEY}"]
    assert told(True, kind="async") == ["AsyncInferenceConfig.OutputConfig.KmsKeyId=answers", "Tags.team=art"]


@pytest.mark.parametrize("scaling", [Scaling(0, 2, "backlog", 5.0, 600), Scaling(1, 40, "concurrency", 2.5, 60)])
def test_scaling_survives_its_tag(scaling: Scaling) -> None:
    assert Scaling.from_tag(scaling.to_tag()) == scaling
    assert tag_value(scaling.to_tag()) == scaling.to_tag()
    assert Scaling.from_tag("") is None is Scaling.from_tag("1:2:other:3:4")


def test_names_are_valid_and_read_back() -> None:
    pattern = r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}"
    for run in ("runs/demo_tiny-full-1a2b", "s3://b/runs/x/", "models:/My Toy@champion", "/tmp/" + "x-" * 60, "..",
                "runs/größe/model"):
        assert re.fullmatch(pattern, default_name(run) + "-v999999999")
    assert default_name("runs/größe_1/model") == "gr-e-1"
    assert [version_number("toy", name) for name in ("toy-v12", "toy-v0", "toys-v1", "my-toy-v1", "toy-v1-v2")] == [
        12, None, None, None, None]
    assert tag_value("s3://b/ä?b\n" + "x" * 400).startswith("s3://b/ä_b")


def test_models_that_differ_never_share_a_default_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint of the same name would be replaced by a deployment, and deleted by action=delete."""
    long = "demo-sd15-lora-with-a-very-long-name-of-the-experiment-"
    names = {run: endpoint_name(run) for run in (
        "runs/toy/", "models:/My Toy@champion", "models:/other/3", f"runs/{long}1a", f"runs/{long}2b", "runs/猫",
        "runs/犬")}
    assert [*names.values()][:3] == ["toy", "My-Toy", "other"] and len(set(names.values())) == len(names)
    assert all(NAME.fullmatch(name) for name in names.values())
    assert endpoint_name("runs/toy/model") == "toy" and endpoint_name("models:/other@champion") == "other"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert endpoint_name(".") == "here"
    for run in ("s3://bucket/runs/A/result-000800", "s3://bucket/job/output/model", "job/output/model", "runs/A/best",
                "runs/A/result-000800", "models:/m-0123"):
        with pytest.raises(UserError, match=f"^run={run} does not tell which endpoint is meant, .*: type name=NAME"):
            open_deployment(Deploy(action=Action.delete, run=run))
