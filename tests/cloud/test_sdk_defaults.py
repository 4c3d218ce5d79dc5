"""Defaults files of the SageMaker SDK: honoured, shown, and refused if they cannot be used."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dreambooth.cloud import job_preparation, sdk_defaults
from dreambooth.errors import ConfigError
from tests.cloud.jobs import GOLDEN, PHOTOS, ROLE, config_of, jobs_of

pytestmark = pytest.mark.usefixtures("environment")
ADMINISTRATOR = f"""\
SchemaVersion: '1.0'
SageMaker:
  TrainingJob:
    RoleArn: {ROLE}-of-the-company
    VpcConfig: {{Subnets: [subnet-1, subnet-2], SecurityGroupIds: [sg-1]}}
    OutputDataConfig: {{KmsKeyId: arn:aws:kms:us-east-1:123456789012:key/1}}
    ResourceConfig: {{VolumeKmsKeyId: arn:aws:kms:us-east-1:123456789012:key/2}}
    EnableInterContainerTrafficEncryption: true
    Environment: {{HTTPS_PROXY: 'http://proxy:3128', PYTORCH_CUDA_ALLOC_CONF: unused}}
    Tags: [{{Key: cost-centre, Value: '17'}}, {{Key: team, Value: unused}}]
"""
USER = """\
SchemaVersion: '1.0'
SageMaker: {TrainingJob: {OutputDataConfig: {KmsKeyId: 'arn:aws:kms:us-east-1:123456789012:key/3'}}}
"""


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, administrator: str, user: str = "") -> None:
    for kind, content in (("ADMIN", administrator), ("USER", user)):
        if content:
            path = folder / f"{kind}.yaml"
            path.write_text(content)
            monkeypatch.setenv(f"SAGEMAKER_{kind}_CONFIG_OVERRIDE", str(path))


def test_a_request_with_a_companys_defaults_equals_the_golden_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, monkeypatch, ADMINISTRATOR, USER)
    [job] = jobs_of(config_of("hardware=g5", "hydra.launcher.role=null", "+hydra.launcher.tags.team=art", *PHOTOS))
    text = json.dumps(job.request, indent=1, sort_keys=True) + "\n"
    path = GOLDEN / "sagemaker-defaults.json"
    if os.environ.get("DREAMBOOTH_WRITE_GOLDEN") and not os.environ.get("CI"):
        path.write_text(text)
    assert text == path.read_text()
    start = "from the defaults of the SageMaker SDK: "
    shown = [line.removeprefix(start) for line in job_preparation.describe_jobs([job, job]) if line.startswith(start)]
    assert shown == [
        "not ResourceConfig.VolumeKmsKeyId, because the instance itself encrypts its own disk", "Tags.cost-centre=17",
        f"RoleArn={ROLE}-of-the-company",
        "VpcConfig={'Subnets': ['subnet-1', 'subnet-2'], 'SecurityGroupIds': ['sg-1']}",
        "OutputDataConfig.KmsKeyId=arn:aws:kms:us-east-1:123456789012:key/3",
        "EnableInterContainerTrafficEncryption=True", "Environment.HTTPS_PROXY"]


def test_a_typed_setting_is_stronger_than_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["hardware=g4dn", "hydra.launcher.kms_key=arn:aws:kms:us-east-1:123456789012:key/9", *PHOTOS,
             "hydra.launcher.subnets=[subnet-9]", "hydra.launcher.security_groups=[sg-9]"]
    [without] = jobs_of(config_of(*words))
    assert without.defaults == (), "there are no defaults files"
    write(tmp_path, monkeypatch, ADMINISTRATOR)
    request = jobs_of(config_of(*words))[0].request
    for key in ("RoleArn", "VpcConfig", "OutputDataConfig", "ResourceConfig"):
        assert request[key] == without.request[key]


def test_a_volume_that_is_not_the_instances_own_gets_the_companys_key() -> None:
    defaults: dict[str, Any] = {"ResourceConfig": {"VolumeKmsKeyId": "key"}}
    request, lines = sdk_defaults.apply({"ResourceConfig": {"InstanceCount": 1}}, defaults, has_own_disk=False)
    assert request == {"ResourceConfig": {"InstanceCount": 1, "VolumeKmsKeyId": "key"}}
    assert lines == ("from the defaults of the SageMaker SDK: ResourceConfig.VolumeKmsKeyId=key",)


@pytest.mark.parametrize("content, problem", [
    (None, "Unable to load the config file from the location"),
    ("a: [", "cannot be used: while parsing a flow"),
    ("just words", r"\$ does not follow the SDK's schema \(type\)"),
    ("SchemaVersion: '1.0'\nSageMaker: {TrainingJob: {RoleArn: hidden}}",
     r"\$.SageMaker.TrainingJob.RoleArn does not follow the SDK's schema \((pattern|minLength)\)"),
    ("SchemaVersion: '1.0'\nSageMaker: {TrainingJob: {Environment: {API_KEY: hidden}}}",
     "job 0: environment API_KEY looks like a credential"),
    ("SchemaVersion: '1.0'\nSageMaker: {TrainingJob: {VpcConfig: {Subnets: [s]}}}",
     "job 0: VpcConfig.SecurityGroupIds is missing"),
])
def test_a_defaults_file_that_cannot_be_used_stops_the_command(
        content: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, monkeypatch, content or "removed")
    if content is None:
        (tmp_path / "ADMIN.yaml").unlink()
    with pytest.raises(ConfigError, match=problem) as caught:
        jobs_of(config_of("hardware=g4dn", *PHOTOS))
    assert "hidden" not in str(caught.value)


def test_without_defaults_files_the_sdk_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sagemaker.core", None)
    assert sdk_defaults.read() == {}
