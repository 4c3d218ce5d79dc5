"""Jobs on SageMaker: their requests, following them through every state, and the permissions that the code needs.

No test calls AWS: botocore's Stubber answers and checks the calls, and its model of the service checks the requests.
"""

import copy
import csv
import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from botocore.stub import Stubber
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from dreambooth import entrypoint
from dreambooth.cloud import docker_backend, follower, request_validation, secrets, sweep_results, training_job_request
from dreambooth.cloud.docker_backend import DockerBackend
from dreambooth.cloud.follower import Follower
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Job, JobState, QuotaExceeded, Unreachable
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.config.compose import conf_dir
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.errors import ConfigError, Interrupted, UserError
from dreambooth.storage import __main__ as storage_command
from dreambooth.storage import aws_errors, folders, s3_bucket
from dreambooth.sweeps import hydra_callbacks
from hydra_plugins.dreambooth_sagemaker import _core, _prepare
from hydra_plugins.dreambooth_sagemaker.launcher import SageMakerLauncher
from tests.support.s3_server import KEYS, plain_client, serving
from tests.support.warm_python import PYTHON

INSPECT = folders.inspect
ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "support/golden"
ROLE = "arn:aws:iam::123456789012:role/dreambooth"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/dreambooth@sha256:" + "0" * 64
LAUNCHER = [f"hydra.launcher.role={ROLE}", f"hydra.launcher.image={IMAGE}", "hydra.launcher.s3=s3://bucket/sweeps",
            "hydra.launcher.plan=false"]
PHOTOS = ["dataset=s3", "dataset.instance_dir=s3://bucket/photos", "dataset.instance_prompt=a photo of a zwx dog",
          "dataset.class_prompt=a photo of a dog"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    content = folders.RemoteContent("0" * 10, is_folder=True, is_complete=True)
    monkeypatch.setattr(folders, "inspect", lambda uri: content)
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    for key in ("DREAMBOOTH_IMAGE", "DREAMBOOTH_ROLE", "DREAMBOOTH_S3", "DREAMBOOTH_SWEEP", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)


@cache
def compose_once(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", ["hydra/launcher=sagemaker", *LAUNCHER, *overrides], return_hydra_config=True)


def config_of(*overrides: str, number: int = 0) -> DictConfig:
    cfg = copy.deepcopy(compose_once(*overrides))
    with open_dict(cfg):
        cfg.hydra.job.num = number
    return cfg


def jobs_of(*configs: DictConfig, client: Any = None) -> list[Job]:
    _prepare.refuse_secrets(configs, "sweep-1")
    return _prepare.prepare_jobs(configs, "sweep-1", SageMakerBackend(client or folders.client("sagemaker")), "aws")


def request_of(*overrides: str) -> dict[str, Any]:
    return jobs_of(config_of(*overrides))[0].request


# -- requests -----------------------------------------------------------------------------------------------------

CASES = {
    "g4dn-spot": ["hardware=g4dn", *PHOTOS, "train.max_train_steps=300", "hydra.launcher.spot=true",
                  "+hydra.launcher.tags.team=art"],
    "g5-on-demand": ["hardware=g5", *PHOTOS, "dataset.class_dir=s3://bucket/dogs", "model.source=s3://bucket/base",
                     "hydra.launcher.mlflow_uri=https://mlflow.example.com", "hydra.launcher.mlflow_secret=mlflow",
                     "hydra.launcher.kms_key=arn:aws:kms:us-east-1:123456789012:key/1",
                     "hydra.launcher.subnets=[subnet-1]", "hydra.launcher.security_groups=[sg-1]"],
    "multi-gpu": ["hardware=g5_12xlarge", *PHOTOS, "hydra.launcher.instance_count=2",
                  "hydra.launcher.keep_alive_minutes=30"],
}


@pytest.mark.parametrize("name", CASES)
def test_a_request_equals_the_golden_file(name: str) -> None:
    text = json.dumps(request_of(*CASES[name]), indent=1, sort_keys=True) + "\n"
    path = GOLDEN / f"sagemaker-{name}.json"
    if os.environ.get("DREAMBOOTH_WRITE_GOLDEN") and not os.environ.get("CI"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_botocores_model_allows_the_golden_requests(name: str) -> None:
    request = json.loads((GOLDEN / f"sagemaker-{name}.json").read_text())
    assert SageMakerBackend().find_problems(request) == []


@pytest.mark.parametrize("change, sentence", [
    ({"TrainingJobName": "a" * 64}, "TrainingJobName has 64 characters, at most 63 are allowed"),
    ({"TrainingJobName": "under_score"}, "TrainingJobName is 'under_score', which does not match"),
    ({"RoleArn": "me"}, "RoleArn has 2 characters, at least 20"),
    ({"HyperParameters": {f"k{i}": "v" for i in range(101)}}, "HyperParameters has 101 entries, at most 100"),
    ({"HyperParameters": {"k": "v" * 2501}}, "HyperParameters.k has 2501 characters"),
    ({"Environment": {"K": "v" * 513}}, "Environment.K has 513 characters, at most 512"),
    ({"Environment": {"1K": "v"}}, "does not match"),
    ({"ResourceConfig": {"InstanceType": "ml.t4.huge"}}, "'ml.t4.huge', which SageMaker does not offer"),
    ({"RetryStrategy": {"MaximumRetryAttempts": 31}}, "MaximumRetryAttempts is 31, at most 30"),
    ({"Tags": [{"Key": "a", "Value": "b" * 257}]}, "Tags[0].Value has 257"),
    ({"Nonsense": 1}, "Nonsense is not known to SageMaker"),
    ({"OutputDataConfig": {"S3OutputPath": "bucket"}}, "S3OutputPath is 'bucket'"),
])
def test_what_aws_would_reject_is_found(change: dict[str, Any], sentence: str) -> None:
    good = json.loads((GOLDEN / "sagemaker-g4dn-spot.json").read_text())
    assert sentence in SageMakerBackend().find_problems(good | change)[0]


def test_a_missing_part_is_found() -> None:
    good = json.loads((GOLDEN / "sagemaker-g4dn-spot.json").read_text())
    del good["RoleArn"]
    assert SageMakerBackend().find_problems(good) == ["RoleArn is missing"]


def test_each_job_has_the_machine_and_price_of_its_own_hardware() -> None:
    found = jobs_of(config_of("hardware=g4dn", *PHOTOS), config_of("hardware=g5", *PHOTOS, number=1))
    assert [job.request["ResourceConfig"]["InstanceType"] for job in found] == ["ml.g4dn.xlarge", "ml.g5.xlarge"]
    assert [job.usd_hour for job in found] == [0.7364, 1.408]
    assert len({job.name for job in found}) == 2


KMS = "hydra.launcher.kms_key=arn:aws:kms:us-east-1:123456789012:key/1"


@pytest.mark.parametrize("words, price, disk", [
    (["hardware=g5"], 1.408, 232),
    (["hardware=g5", "hydra.launcher.instance_type=ml.g5.xlarge"], 1.408, 232),
    (["hardware=g5", "hydra.launcher.instance_type=ml.g5.12xlarge"], None, None),
    (["hardware=g5", "hardware.instance_type=ml.g5.12xlarge"], None, None),
    (["hardware=g5", "hardware.instance_type=ml.p3.2xlarge", "hardware.price_usd_hour=3.825"], 3.825, None),
    (["hardware=g5", "hardware.instance_type=ml.g5.12xlarge", "hydra.launcher.price_usd_hour=7.09"], 7.09, None),
    (["hardware=g5", "hydra.launcher.instance_type=ml.g5.12xlarge", "hydra.launcher.price_usd_hour=7.09",
      "hydra.launcher.disk_gib=3539"], 7.09, 3539),
    (["hardware=g5_12xlarge", "hydra.launcher.instance_count=2"], 2 * 7.09, 3539),
])
def test_price_and_disk_of_another_instance_are_not_guessed(
        words: list[str], price: float | None, disk: int | None) -> None:
    """An instance without a disk of its own gets a volume of the size that was typed, encrypted with the key."""
    [job] = jobs_of(config_of(*words, *PHOTOS, KMS, "hydra.launcher.volume_gib=9000"))
    assert job.usd_hour == price
    shown = "price unknown" if price is None else f"${price:.4g}/h"
    assert shown in next(iter(_prepare.describe_jobs([job])))
    resources = job.request["ResourceConfig"]
    assert (resources["VolumeSizeInGB"], "VolumeKmsKeyId" in resources) == (disk or 9000, disk is None)


def test_the_total_names_the_number_of_jobs_that_it_covers() -> None:
    resources: dict[str, Any] = {"ResourceConfig": {"InstanceCount": 1, "InstanceType": "ml.g5.xlarge"}}
    jobs = [Job(0, "a", (), resources, 1, 2.0, 1.5, 2700), Job(1, "b", (), resources, 1, 2.0, 0.25, 450),
            Job(2, "c", (), resources, 1, None, None, 450)]
    assert list(_prepare.describe_jobs(jobs[:2]))[-1] == "2 jobs, about $1.75 (estimate: see docs/planner.md)"
    assert list(_prepare.describe_jobs(jobs))[-1] == (
        "3 jobs, about $1.75 for 2 of them; 1 without a price: type hydra.launcher.price_usd_hour=PRICE "
        "(estimate: see docs/planner.md)")
    in_docker = "".join(_prepare.describe_jobs(jobs[2:], "docker"))
    assert "price" not in in_docker, "a container on this machine costs nothing"
    assert list(_prepare.describe_jobs(jobs[2:]))[-1] == (
        "1 jobs; 1 without a price: type hydra.launcher.price_usd_hour=PRICE")


def test_without_torch_it_says_that_memory_was_not_checked(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_prepare, "find_spec", lambda name: None)
    [job] = jobs_of(config_of("hardware=g4dn", *PHOTOS, "hydra.launcher.plan=true"))
    assert "torch is not installed here: not checked whether the jobs fit in memory" in capsys.readouterr().out
    assert (job.estimate_usd, job.request["ResourceConfig"]["VolumeSizeInGB"]) == (None, 110)


@pytest.mark.slow
def test_cost_and_volume_of_a_job_come_from_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", PYTHON)
    [job] = jobs_of(config_of("hardware=g4dn", *PHOTOS, "hydra.launcher.plan=true"))
    assert job.estimate_seconds and job.estimate_usd == pytest.approx(job.estimate_seconds / 3600 * 0.7364)
    assert 10 < job.request["ResourceConfig"]["VolumeSizeInGB"] < 110
    assert re.search(r" for \d+\.\d h, about \$\d+\.\d\d ", next(iter(_prepare.describe_jobs([job]))))


def test_all_jobs_are_checked_before_the_first() -> None:
    with pytest.raises(ConfigError) as caught:
        jobs_of(config_of("hardware=g4dn", "precision=bf16", *PHOTOS),
                config_of("hardware=g4dn", "train.max_train_steps=0", *PHOTOS, number=1))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["job 0", "job 1"]


def test_a_half_uploaded_base_is_found_before_a_job_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with serving():
        plain_client().create_bucket(Bucket="bucket")
        plain_client().put_object(Bucket="bucket", Key="base/model_index.json", Body=b"{}")
        with pytest.raises(ConfigError, match="half uploaded"):
            request_of("hardware=g4dn", *PHOTOS, "model.source=s3://bucket/base")


@pytest.mark.parametrize("words", [
    "+hydra.launcher.environment.MLFLOW_TRACKING_PASSWORD=x", "+hydra.launcher.environment.AWS_SECRET_ACCESS_KEY=x",
    "+hydra.launcher.environment.URL='https://me:hidden@host'", "hydra.launcher.mlflow_uri='https://me:hidden@host'",
    "+hydra.launcher.environment.WANDB_API_KEY=hidden", "+hydra.launcher.environment.URL='https://hidden@host'",
    "+hydra.launcher.environment.HUB=hf_hiddenhiddenhiddenhidden",
    "+hydra.launcher.environment.URL='https://h/?token=hidden'",
    "+hydra.launcher.environment.ID=ASI" + "AHIDDENHIDDEN0000", "+hydra.launcher.tags.note=hf_hiddenhiddenhiddenhidden",
    "+hydra.launcher.tags.password=hidden", "tracking.uri='https://me:hidden@host'", "train.max_train_steps=0",
    "hydra.launcher.mlflow_secret='{\"password\": \"hidden\"}'",
    "hydra.launcher.mlflow_secret=hf_hiddenhiddenhiddenhidden",
])
def test_a_credential_is_refused_and_not_stored(words: str, tmp_path: Path) -> None:
    """Also if there are other mistakes; Hydra has written the command to multirun.yaml before it calls the launcher."""
    stored = tmp_path / "multirun.yaml"
    stored.write_text("typed")
    mistake = words == "train.max_train_steps=0"
    with pytest.raises(ConfigError) as caught:
        request_of("hardware=g4dn", f"run_root={tmp_path}", *PHOTOS, words, "train.gradient_accumulation_steps=0")
    assert ("Secrets Manager" in str(caught.value)) is not mistake
    assert "hidden" not in str(caught.value).lower()
    assert stored.exists() is mistake


def test_a_value_that_only_resembles_a_credential_is_accepted() -> None:
    sent = request_of("hardware=g4dn", *PHOTOS, "+hydra.launcher.environment.TOKENIZERS_PARALLELISM='false'",
                 "hydra.launcher.mlflow_secret=arn:aws:secretsmanager:us-east-1:123456789012:secret:team/mlflow-a1B2c3",
                 "+hydra.launcher.tags.team=art")["Environment"]
    assert sent["TOKENIZERS_PARALLELISM"] == "false"
    assert sent["DREAMBOOTH_SECRET"].endswith("secret:team/mlflow-a1B2c3")


@pytest.mark.parametrize("address, reached", [
    ("http://127.0.0.1:5000", False), ("http://localhost:5000", False), ("http://[::1]:5000", False),
    ("sqlite:///mlflow.db", False), ("file:///runs", False), ("runs/mlruns", False),
    ("https://mlflow.example.com", True), ("http://team-mlflow:5000", True), ("databricks", True),
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/team", True)])
def test_an_mlflow_address_that_jobs_cannot_reach_is_refused(
        address: str, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    if reached:
        assert request_of("hardware=g4dn", *PHOTOS)["Environment"]["MLFLOW_TRACKING_URI"] == address
        return
    with pytest.raises(ConfigError, match=r"do not reach MLflow .* type hydra\.launcher\.mlflow_uri=https://SERVER"):
        request_of("hardware=g4dn", *PHOTOS)
    with pytest.raises(ConfigError, match=r"type tracking\.uri=https://SERVER"):
        request_of("hardware=g4dn", *PHOTOS, f"tracking.uri='{address}'")
    request = request_of("hardware=g4dn", *PHOTOS, "hydra.launcher.mlflow_uri=null")
    assert "MLFLOW_TRACKING_URI" not in request["Environment"]
    request_of("hardware=g4dn", *PHOTOS, "tracking=none")


def test_the_arn_of_a_managed_mlflow_server_is_its_address() -> None:
    arn = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/team"
    sent = request_of("hardware=g4dn", *PHOTOS, f"hydra.launcher.mlflow_uri={arn}")
    assert sent["Environment"]["MLFLOW_TRACKING_URI"] == arn
    assert sent["HyperParameters"]["tracking.uri"] == "${oc.env:MLFLOW_TRACKING_URI}"


def test_confidential_values_are_not_repeated_in_messages() -> None:
    good = json.loads((GOLDEN / "sagemaker-g4dn-spot.json").read_text())
    [problem] = SageMakerBackend().find_problems(good | {"Environment": {"A": 17}})
    assert problem == "Environment.A must be a string, not the typed value"
    [problem] = SageMakerBackend().find_problems(good | {"Tags": [{"Key": "a", "Value": "hidden;"}]})
    assert problem.startswith("Tags[0].Value is the typed value, which does not match")


def test_a_job_loads_its_credentials_from_secrets_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    client = folders.client("secretsmanager")
    monkeypatch.setenv("DREAMBOOTH_SECRET", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.setattr(folders, "client", lambda service: client)
    with Stubber(client) as stub:
        stub.add_response("get_secret_value", {"SecretString": '{"username": "me", "password": "p"}'},
                          {"SecretId": "mlflow"})
        monkeypatch.setattr(os, "environ", dict(os.environ))
        secrets.load()
        assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p")
        stub.add_response("get_secret_value", {"SecretString": "not json"}, {"SecretId": "mlflow"})
        with pytest.raises(UserError, match="must be a JSON object"):
            secrets.load()


def test_a_resubmitted_job_resumes_from_the_first_attempts_checkpoints(stub: Stubber, job: Job) -> None:
    expect_poll(stub, job, "Failed", "Failed")
    stub.add_client_error("describe_training_job", "ValidationException", "Requested resource not found.", 400)
    [again] = jobs_of(config_of("hardware=g4dn", *PHOTOS, "hydra.launcher.spot=true", "hydra.launcher.resubmit=true"),
                      client=stub.client)
    assert again.name == f"{job.name}-1"
    assert again.request["CheckpointConfig"] == job.request["CheckpointConfig"]


def test_folders_of_the_submitting_machine_are_not_sent() -> None:
    sent = request_of("hardware=g4dn", *PHOTOS, "run_root=here", "storage.cache=there")["HyperParameters"]
    assert not sent.keys() & {"run_root", "storage.cache", "dataset", "dataset.instance_dir"}


def test_job_names_identify_the_run_and_are_valid() -> None:
    name = training_job_request.job_name("my sweep, 2026!", 3, {"a": "1", "b": "2"}, {"model.source": "0a"})
    assert name == training_job_request.job_name(
        "my sweep, 2026!", 3, {"b": "2", "a": "1", "tracking.uri": "x"}, {"model.source": "0a"})
    assert name != training_job_request.job_name("my sweep, 2026!", 3, {"a": "2", "b": "2"}, {"model.source": "0a"})
    assert name != training_job_request.job_name("my sweep, 2026!", 3, {"a": "1", "b": "2"}, {"model.source": "0b"})
    name = training_job_request.job_name("x-" * 60, 10**6, {"a": "1"}, {}, 99)
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name)


@pytest.mark.parametrize("mode", ["aws", "docker"])
def test_job_names_do_not_depend_on_the_machine_but_on_the_photos(
        mode: str, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(machine: str, photo: bytes, *words: str) -> str:
        folder = tmp_path / machine / f"photos of {machine}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.jpg").write_bytes(photo)
        config = config_of("hardware=g4dn", "dataset=folder", f"dataset.instance_dir='{folder}'",
                          "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog",
                          f"run_root={tmp_path}/{machine}/runs", f"storage.cache={tmp_path}/{machine}/cache", *words)
        backend = DockerBackend(tmp_path / "jobs") if mode == "docker" else SageMakerBackend()
        return _prepare.prepare_jobs([config], "mine", backend, mode)[0].name

    with serving():
        plain_client().create_bucket(Bucket="bucket")
        first = name("laptop", b"a")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
        assert name("desktop", b"a") == first
        assert name("desktop", b"a", "tracking.experiment=other", "hardware.price_usd_hour=2") == first
        assert name("desktop", b"b") != first, "a job on other photos is another job"
        assert name("laptop", b"a", "train.seed=1") != first


def test_other_photos_at_the_same_s3_path_are_another_job() -> None:
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "inspect", INSPECT)
        plain_client().create_bucket(Bucket="bucket")
        names = []
        for body in (b"a", b"a", b"b"):
            plain_client().put_object(Bucket="bucket", Key="photos/a.jpg", Body=body)
            names.append(jobs_of(config_of("hardware=g4dn", *PHOTOS))[0].name)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("words, sentence", [
    (["dataset.instance_dir=s3://bucket/phtos"], "there is nothing in s3://bucket/phtos: type dataset.instance_dir=s3://"),
    (["dataset.instance_dir=s3://bucket/phot"], "there is nothing in s3://bucket/phot:"),
    (["dataset.instance_dir=s3://bucket/photos/a.jpg"], "there is nothing in s3://bucket/photos/a.jpg:"),
    (["dataset.class_dir=s3://bucket/dogs"], "type dataset.class_dir=s3://BUCKET/FOLDER"),
    (["evaluate.reference_dir=s3://bucket/dogs"], "type evaluate.reference_dir=s3://BUCKET/FOLDER"),
    (["model.source=s3://bucket/base.ckpt"], "type model.source=s3://BUCKET/FILE"),
    (["model.vae=s3://bucket/vae"], "type model.vae=s3://BUCKET/FOLDER"),
    (["evaluate.prompts=s3://bucket/p.txt"], "type evaluate.prompts=s3://BUCKET/FILE"),
    (["evaluate.lpips=s3://bucket/x.safetensors"], "type evaluate.lpips=s3://BUCKET/FILE"),
    (["checkpoint.resume=s3://bucket/photos"], "half uploaded"),
])
def test_missing_s3_inputs_are_reported_before_submission(words: list[str], sentence: str) -> None:
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "inspect", INSPECT)
        plain_client().create_bucket(Bucket="bucket")
        plain_client().put_object(Bucket="bucket", Key="photos/a.jpg", Body=b"a")
        request_of("hardware=g4dn", *PHOTOS)
        with pytest.raises(ConfigError) as caught:
            request_of("hardware=g4dn", *PHOTOS, *words)
    assert sentence in str(caught.value)


def test_a_single_file_base_in_s3_is_passed_by_its_address() -> None:
    """A channel can only be a folder; the run downloads the file itself."""
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "inspect", INSPECT)
        plain_client().create_bucket(Bucket="bucket")
        for key in ("photos/a.jpg", "base.safetensors"):
            plain_client().put_object(Bucket="bucket", Key=key, Body=b"a")
        sent = request_of("hardware=g4dn", *PHOTOS, "model.source=s3://bucket/base.safetensors")
    assert sent["HyperParameters"]["model.source"] == "s3://bucket/base.safetensors"
    assert [channel["ChannelName"] for channel in sent["InputDataConfig"]] == ["images"]


@pytest.mark.parametrize("key, name, sentence", [
    ("model.source", "base.safetensors", "is a file of this machine: type model.source=s3://BUCKET/FILE"),
    ("model.vae", "vae.safetensors", "is a file of this machine: type model.vae=s3://BUCKET/FILE"),
    ("model.vae", "vae", "is a folder of this machine: type model.vae=s3://BUCKET/FOLDER"),
    ("evaluate.prompts", "p.txt", "is a file of this machine: type evaluate.prompts=s3://BUCKET/FILE"),
    ("evaluate.lpips", "x.safetensors", "is a file of this machine: type evaluate.lpips=s3://BUCKET/FILE"),
    ("evaluate.dino", "dino", "type evaluate.dino=HUB_ID"),
])
def test_local_paths_that_a_job_cannot_read_are_refused(
        key: str, name: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("a {subject}") if path.suffix else path.mkdir()
    with pytest.raises(ConfigError) as caught:
        request_of("hardware=g4dn", *PHOTOS, f"{key}={path}", "evaluate.encoder=paper")
    assert sentence in str(caught.value)


def test_paths_that_a_job_can_read_are_sent() -> None:
    words = ["model.vae=stabilityai/sd-vae-ft-mse", "evaluate.prompts=object", "checkpoint.resume=s3://bucket/step-000100",
             "evaluate.lpips=s3://bucket/x.safetensors", "evaluate.reference_dir=s3://bucket/dogs"]
    sent = request_of("hardware=g4dn", *PHOTOS, *words)["HyperParameters"]
    assert {f"{key}={value}" for key, value in sent.items()} >= {*words}
    assert "evaluate.prompts" in request_of("hardware=g4dn", *PHOTOS, "evaluate.prompts=s3://bucket/p.txt")["HyperParameters"]


def test_trials_are_named_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_callbacks, "_varied_keys", ["train.learning_rate", "train.seed"])
    sent = request_of("hardware=g4dn", *PHOTOS, "train.learning_rate=1e-6", "train.seed=2")["HyperParameters"]
    assert sent["tracking.run_name"] == "learning_rate=1e-6 seed=2"
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/hyperparameters.json").write_text(json.dumps(sent))
    shutil.copytree(ROOT / "dreambooth/assets/demo", tmp_path / "input/data/images")
    words = entrypoint.read_request(SageMakerPaths(tmp_path), [], None).to_args()
    assert entrypoint.compose_run(words)[0].tracking.run_name == "learning_rate=1e-6 seed=2"


def test_volume_size_follows_the_plan_up_to_the_instances_own_disk() -> None:
    settings = training_job_request.JobSettings(IMAGE, ROLE, "s3://b/p", "ml.g4dn.xlarge")

    def volume(disk: float | None, needed: float | None) -> int:
        body = training_job_request.build_request(settings, "n", "s", [], {}, disk, needed)
        return int(body["ResourceConfig"]["VolumeSizeInGB"])

    assert [volume(None, 41.2), volume(None, None), volume(116, 200.0), volume(116, 20)] == [52, 110, 116, 30]


def test_local_photos_are_uploaded_once_with_progress(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    words = ["hardware=g4dn", "dataset=folder", f"dataset.instance_dir={tmp_path}/photos",
             "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog"]
    with serving():
        plain_client().create_bucket(Bucket="bucket")
        found = jobs_of(config_of(*words, "train.seed=0"), config_of(*words, "train.seed=1", number=1))
        assert re.search(r"^to s3://bucket/sweeps/inputs/photos-\w+ 1/1 ", capsys.readouterr().out, re.M)
        places = {job.request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] for job in found}
        [place] = places
        assert place.startswith("s3://bucket/sweeps/inputs/photos-")
        assert "a.jpg" in (folders.read_manifest(place.rstrip("/")) or {})
    assert "dataset.instance_dir" not in found[0].request["HyperParameters"]


# -- SageMaker's states, by Stubber -------------------------------------------------------------------------------

@pytest.fixture
def job() -> Job:
    [found] = jobs_of(config_of("hardware=g4dn", *PHOTOS, "hydra.launcher.spot=true"))
    return found


@pytest.fixture
def stub() -> Iterator[Stubber]:
    client = folders.client("sagemaker")
    with Stubber(client) as found:
        yield found
        found.assert_no_pending_responses()


def description(job: Job, status: str, detail: str, **more: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"TrainingJobName": job.name, "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/x",
            "ModelArtifacts": {"S3ModelArtifacts": f"s3://bucket/sweeps/{job.name}/output/model/"},
            "TrainingJobStatus": status, "SecondaryStatus": detail, "HyperParameters": job.request["HyperParameters"],
            "AlgorithmSpecification": job.request["AlgorithmSpecification"],
            "ResourceConfig": job.request["ResourceConfig"], "StoppingCondition": job.request["StoppingCondition"],
            "CreationTime": now} | more


def expect_poll(stub: Stubber, job: Job, status: str, detail: str, **more: Any) -> None:
    stub.add_response("describe_training_job", description(job, status, detail, **more), {"TrainingJobName": job.name})


def expect_creation(stub: Stubber, job: Job) -> None:
    """Expect exactly the request of the job."""
    stub.add_response("create_training_job", {
        "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/x"}, job.request)


def follow(stub: Stubber, *jobs: Job, sleeps: list[float] | None = None, **options: Any) -> list[JobState]:
    waits = sleeps if sleeps is not None else []
    defaults: dict[str, Any] = {"max_parallel": 4, "poll_seconds": 20, "stop_on_interrupt": False,
                                "follow_hint": "AGAIN", "sleep": waits.append}
    return Follower(SageMakerBackend(stub.client), jobs, **(defaults | options)).run()


def metrics(step: float, loss: float) -> list[dict[str, Any]]:
    now = datetime.now(UTC)
    return [{"MetricName": "step", "Value": step, "Timestamp": now},
            {"MetricName": "loss", "Value": loss, "Timestamp": now}]


def test_in_progress_interrupted_restarting_completed(
        stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 0.25, "step": 800, "uri": uri})
    expect_creation(stub, job)
    start = datetime.now(UTC) - timedelta(hours=2)
    expect_poll(stub, job, "InProgress", "Pending")
    expect_poll(stub, job, "InProgress", "Training", TrainingStartTime=start, FinalMetricDataList=metrics(100, 0.3))
    expect_poll(stub, job, "InProgress", "Interrupted", TrainingStartTime=start)
    expect_poll(stub, job, "InProgress", "Restarting", TrainingStartTime=start)
    expect_poll(stub, job, "InProgress", "Uploading", TrainingStartTime=start, FinalMetricDataList=metrics(800, 0.2))
    expect_poll(stub, job, "Completed", "Completed", TrainingTimeInSeconds=7200, BillableTimeInSeconds=1800)
    [state] = follow(stub, job)
    assert (state.status, state.step, state.loss) == (COMPLETED, 800, 0.2)
    assert state.result["uri"] == f"s3://bucket/sweeps/{job.name}/output/model/result.json"
    assert sweep_results.objective(state) == 0.25
    assert state.cost_usd(job) == pytest.approx(0.7364 / 2), "a spot job is billed for its billable seconds"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(job.name)]
    assert lines[:7] == [f"{job.name}  InProgress  {detail}" for detail in (
        "Starting", "Pending", "Training", "Interrupted", "Restarting", "Uploading")] + [
        f"{job.name}  Completed  Completed"]


@pytest.mark.parametrize("status, detail, more, reason", [
    ("Failed", "Failed", {"FailureReason": "AlgorithmError: exit code 3"}, "AlgorithmError: exit code 3"),
    ("Failed", "Failed", {"FailureReason": "CapacityError: no ml.g4dn.xlarge"}, "CapacityError: no ml.g4dn.xlarge"),
    ("Stopped", "MaxRuntimeExceeded", {}, "it was stopped (MaxRuntimeExceeded)"),
    ("Stopped", "MaxWaitTimeExceeded", {}, "it was stopped (MaxWaitTimeExceeded)"),
])
def test_failed_and_stopped(stub: Stubber, job: Job, status: str, detail: str, more: dict[str, Any],
                            reason: str) -> None:
    expect_creation(stub, job)
    expect_poll(stub, job, "Stopping", "Stopping")
    expect_poll(stub, job, status, detail, BillableTimeInSeconds=60, **more)
    [state] = follow(stub, job)
    assert (state.status, state.reason) == (FAILED if status == "Failed" else STOPPED, reason)
    assert sweep_results.objective(state) is None


def test_a_throttled_call_is_repeated_with_longer_pauses(
        stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    stub.add_client_error("create_training_job", "ThrottlingException", "Rate exceeded", 400)
    expect_creation(stub, job)
    for _ in range(3):
        stub.add_client_error("describe_training_job", "ThrottlingException", "Rate exceeded", 400)
    expect_poll(stub, job, "InProgress", "Training")
    expect_poll(stub, job, "Completed", "Completed")
    waits: list[float] = []
    [state] = follow(stub, job, sleeps=waits)
    assert state.status == COMPLETED
    assert waits == [40, 20, 40, 80, 120, 20]


class Offline:
    """A client whose network fails in the calls with the numbers `dead`."""

    def __init__(self, client: Any, dead: set[int]) -> None:
        self._client, self._dead, self.count = client, dead, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in ("create_training_job", "describe_training_job"):
            return method

        def call(**arguments: Any) -> Any:
            self.count += 1
            if self.count in self._dead:
                raise EndpointConnectionError(endpoint_url="https://sagemaker")
            return method(**arguments)

        return call


def test_a_network_failure_loses_no_job(stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    expect_creation(stub, job)
    expect_poll(stub, job, "InProgress", "Training")
    expect_poll(stub, job, "Completed", "Completed")
    backend = SageMakerBackend(Offline(stub.client, {2, 3, 4, 6}))
    [state] = Follower(backend, [job], max_parallel=1, poll_seconds=1, stop_on_interrupt=False, follow_hint="AGAIN",
                     sleep=lambda seconds: None).run()
    assert state.status == COMPLETED
    assert capsys.readouterr().out.count("AWS does not answer") == 2


def test_a_long_network_failure_leaves_the_jobs_running(stub: Stubber, job: Job) -> None:
    expect_creation(stub, job)
    clock = iter(range(0, 10**6, 1000))
    backend = SageMakerBackend(Offline(stub.client, set(range(2, 100))))
    with pytest.raises(UserError, match="1 job still running: AGAIN"):
        Follower(backend, [job], max_parallel=1, poll_seconds=1, stop_on_interrupt=False, follow_hint="AGAIN",
                 sleep=lambda seconds: None, clock=lambda: next(clock)).run()


def test_a_lost_answer_does_not_start_the_job_twice(stub: Stubber, job: Job,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    stub.add_client_error("create_training_job", "ResourceInUse", "Training job names must be unique", 400)
    expect_poll(stub, job, "InProgress", "Training")
    expect_poll(stub, job, "Completed", "Completed")
    [state] = follow(stub, job)
    assert state.status == COMPLETED


def test_another_job_with_the_same_name_is_an_error(stub: Stubber, job: Job) -> None:
    stub.add_client_error("create_training_job", "ResourceInUse", "Training job names must be unique", 400)
    existing = job.request["HyperParameters"] | {"hardware": "g5"}
    expect_poll(stub, job, "InProgress", "Training", HyperParameters=existing)
    [state] = follow(stub, job)
    assert state.status == FAILED
    assert "differs in hardware: type another hydra.launcher.sweep=NAME" in state.reason


def test_a_job_with_another_mlflow_server_is_the_same_job(
        stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started from a shell with MLFLOW_TRACKING_URI, followed from one without."""
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    existing = job.request["HyperParameters"] | {
        "tracking.uri": "${oc.env:MLFLOW_TRACKING_URI}", "tracking.run_name": "x"}
    stub.add_client_error("create_training_job", "ResourceInUse", "Training job names must be unique", 400)
    expect_poll(stub, job, "InProgress", "Training", HyperParameters=existing)
    expect_poll(stub, job, "Completed", "Completed", HyperParameters=existing)
    [state] = follow(stub, job)
    assert state.status == COMPLETED


def test_a_used_up_quota_waits_for_own_jobs_or_fails(stub: Stubber, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    one, two = jobs_of(config_of("hardware=g4dn", *PHOTOS),
                       config_of("hardware=g4dn", "train.seed=1", *PHOTOS, number=1))
    expect_creation(stub, one)
    stub.add_client_error("create_training_job", "ResourceLimitExceeded", "quota", 400)
    expect_poll(stub, one, "Completed", "Completed")
    expect_creation(stub, two)
    expect_poll(stub, two, "Completed", "Completed")
    assert [state.status for state in follow(stub, one, two)] == [COMPLETED, COMPLETED]
    stub.add_client_error("create_training_job", "ResourceLimitExceeded", "quota", 400)
    [state] = follow(stub, one)
    assert "Service Quotas" in state.reason


def test_a_job_that_may_not_be_created_fails_alone(stub: Stubber, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    one, two = jobs_of(config_of("hardware=g4dn", *PHOTOS),
                       config_of("hardware=g4dn", "train.seed=1", *PHOTOS, number=1))
    stub.add_client_error("create_training_job", "AccessDeniedException", "no", 403)
    expect_creation(stub, two)
    expect_poll(stub, two, "Completed", "Completed")
    first, second = follow(stub, one, two)
    assert (first.status, second.status) == (FAILED, COMPLETED)
    assert first.reason.startswith("no permission for sagemaker:CreateTrainingJob")


def test_at_most_max_parallel_jobs_run(job: Job) -> None:
    class Counting:
        def __init__(self) -> None:
            self.running: dict[str, int] = {}
            self.most = 0

        def submit(self, job: Job) -> JobState:
            self.running[job.name] = 2
            self.most = max(self.most, len(self.running))
            return JobState(RUNNING)

        def poll(self, job: Job) -> JobState:
            self.running[job.name] -= 1
            if self.running[job.name]:
                return JobState(RUNNING)
            del self.running[job.name]
            return JobState(COMPLETED)

    counting: Any = Counting()
    jobs = [Job(i, f"j{i}", (), {}, 1) for i in range(7)]
    states = Follower(counting, jobs, max_parallel=3, poll_seconds=0, stop_on_interrupt=False, follow_hint="",
                    sleep=lambda seconds: None).run()
    assert (counting.most, [state.status for state in states]) == (3, [COMPLETED] * 7)


@pytest.mark.parametrize("stop", [True, False])
def test_ctrl_c_stops_or_leaves_the_jobs(stub: Stubber, job: Job, stop: bool) -> None:
    expect_creation(stub, job)
    if stop:
        stub.add_response("stop_training_job", {}, {"TrainingJobName": job.name})

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        follow(stub, job, stop_on_interrupt=stop, sleep=interrupted)
    message = str(caught.value)
    if stop:
        assert message == "1 job asked to save and stop"
    else:
        assert "1 job still running: AGAIN; to stop them type" in message
        assert f"aws sagemaker stop-training-job --training-job-name {job.name}" in message


def test_a_running_job_shows_its_cost_so_far(stub: Stubber, job: Job) -> None:
    expect_poll(stub, job, "InProgress", "Restarting", TrainingTimeInSeconds=3600, BillableTimeInSeconds=60)
    expect_poll(stub, job, "Stopped", "Stopped", TrainingTimeInSeconds=3600, BillableTimeInSeconds=1800)
    backend = SageMakerBackend(stub.client)
    assert [follower.table_row(job, backend.poll(job))[4] for _ in range(2)] == ["$0.74 so far", "$0.37"]


def test_a_result_that_cannot_be_read_is_a_failure(stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uri: str) -> dict[str, Any]:
        raise UserError("there is nothing")

    monkeypatch.setattr(folders, "read_json", missing)
    expect_creation(stub, job)
    expect_poll(stub, job, "Completed", "Completed", BillableTimeInSeconds=60)
    [state] = [sweep_results.fail_without_objective(state) for state in follow(stub, job)]
    assert state.status == FAILED
    assert "result.json cannot be read" in state.reason


def test_has_failed_finds_jobs_that_failed(stub: Stubber, job: Job) -> None:
    expect_poll(stub, job, "Failed", "Failed")
    stub.add_client_error("describe_training_job", "ValidationException", "Requested resource not found.", 400)
    backend = SageMakerBackend(stub.client)
    assert [backend.has_failed(job.name), backend.has_failed(job.name)] == [True, False]


# -- results -----------------------------------------------------------------------------------------------------

def test_results_are_a_csv_with_the_best_first_and_a_run_in_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    jobs = [Job(i, f"j{i}", (f"train.seed={i}",), {}, 1, usd_hour=2.0) for i in range(3)]
    states = [JobState(COMPLETED, billed_seconds=1800, result={"objective": 0.5}),
              JobState(FAILED, billed_seconds=0, reason="no, it did not"),
              JobState(COMPLETED, billed_seconds=3600, result={"objective": 0.25})]
    rows = sweep_results.result_rows(jobs, states)
    path = sweep_results.write_table(tmp_path, "mine", rows)
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert [(row["job"], row["objective"], row["billed_usd"], row["train.seed"]) for row in found] == [
        ("j2", "0.25", "2.0", "2"), ("j0", "0.5", "1.0", "0"), ("j1", "", "0.0", "1")]
    plot = sweep_results.write_parallel_coordinates(tmp_path, "mine", sweep_results.parallel_axes(rows))
    assert json.loads(plot.read_text())["axes"] == {"seed": ["2", "0"], "objective": [0.25, 0.5]}
    sweep_results.log_sweep(path, "mine", rows, "mlflow", None, "sweeps", tmp_path, plot, local=False)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sweeps")
    [run] = client.search_runs([experiment.experiment_id], "tags.sweep = 'mine'")
    assert (run.data.metrics["objective"], run.data.metrics["failed"], run.info.status) == (0.25, 1, "FAILED")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {path.name, plot.name}
    assert "dreambooth.compare" not in run.data.tags["mlflow.note.content"], "the run folders are not on this machine"


@pytest.mark.parametrize("mode, typed, uri", [
    ("aws", [], "https://mlflow.example.com"), ("docker", [], "https://mlflow.example.com"), ("local", [], None),
    ("aws", ["tracking.uri=https://other.example.com"], "https://other.example.com")])
def test_a_sweep_is_logged_to_the_mlflow_of_its_trials(
        mode: str, typed: list[str], uri: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(sweep_results, "log_sweep", lambda *args, local, **options: calls.append((args[4], local)))
    config = config_of("hardware=g4dn", f"run_root={tmp_path}", *PHOTOS,
                      "hydra.launcher.mlflow_uri=https://mlflow.example.com", *typed)
    sweep = SageMakerLauncher(mode=mode, sweep="mine").sweep
    sweep.config = config
    _core._report(sweep, [Job(0, "j0", (), {}, 1)], [JobState(COMPLETED, result={"objective": 0.5})], config)
    assert calls == [(uri, mode == "local")]


# -- containers on this machine -----------------------------------------------------------------------------------

ENGINE = """#!/bin/sh
# Fake docker: reads the mounts and does what a training image does.
case "$1" in container) echo "Error: No such container" >&2; exit 1;; esac
while [ $# -gt 0 ]; do
  case "$1 $2" in "--volume "*:/opt/ml) base="${2%:/opt/ml}";; esac
  last="$1"; shift
done
[ "$last" = train ] || exit 9
if grep -q '"train.seed": "3"' "$base/input/config/hyperparameters.json"; then
  echo "photo.jpg is broken" > "$base/output/failure"; exit 1; fi
echo 'training 2/2  9.9/s  loss 0.125'
echo '{"objective": 0.5, "step": 2}' > "$base/model/result.json"
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "bin" / "docker"
    path.parent.mkdir()
    path.write_text(ENGINE)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return str(path)


def test_containers_get_the_files_that_sagemaker_provides(engine: str, tmp_path: Path) -> None:
    """Six jobs with a fake engine; the real image has tests of its own."""
    backend = DockerBackend(tmp_path / "jobs")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"a")
    words = ["hardware=g4dn", "dataset=folder", f"dataset.instance_dir={photos}", "dataset.instance_prompt=a zwx dog",
             "dataset.class_prompt=a dog"]
    configs = [config_of(*words, f"train.seed={i}", number=i) for i in range(6)]
    jobs = _prepare.prepare_jobs(configs, "six", backend, "docker")
    states = [sweep_results.fail_without_objective(state) for state in Follower(
        backend, jobs, max_parallel=2, poll_seconds=0.05, stop_on_interrupt=False, follow_hint="").run()]
    assert [state.status for state in states] == [COMPLETED] * 3 + [FAILED] + [COMPLETED] * 2
    assert states[3].reason == "exit code 1: photo.jpg is broken"
    assert (states[0].step, states[0].loss, sweep_results.objective(states[0])) == (2, 0.125, 0.5)
    config = tmp_path / "jobs" / jobs[0].name / "input/config"
    assert json.loads((config / "hyperparameters.json").read_text())["train.seed"] == "0"
    assert list(json.loads((config / "inputdataconfig.json").read_text())) == ["images"]
    assert json.loads((config / "resourceconfig.json").read_text())["hosts"] == ["algo-1"]


@pytest.mark.parametrize(("uri", "words"), [
    ("http://127.0.0.1:5000", ["--network", "host"]), ("http://localhost:5000", ["--network", "host"]),
    ("https://mlflow.example.com", []), ("http://[::1]:5000", ["--network", "host"]),
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/x", [])])
def test_a_container_reaches_a_server_on_this_machine(uri: str, words: list[str]) -> None:
    assert docker_backend.network_options({"MLFLOW_TRACKING_URI": uri, "DREAMBOOTH_SWEEP": "six"}) == words


def test_a_missing_engine_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it" in docker_backend.DockerBackend(tmp_path).find_problems({})[0]


# -- permissions --------------------------------------------------------------------------------------------------

S3_CALLS = {"get_object": "s3:GetObject", "head_object": "s3:GetObject", "put_object": "s3:PutObject",
            "list_objects_v2": "s3:ListBucket", "list_multipart_uploads": "s3:ListBucketMultipartUploads",
            "list_parts": "s3:ListMultipartUploadParts", "create_multipart_upload": "s3:PutObject",
            "upload_part": "s3:PutObject", "complete_multipart_upload": "s3:PutObject"}
OTHER_CALLS = {"create_training_job": "sagemaker:CreateTrainingJob", "stop_training_job": "sagemaker:StopTrainingJob",
               "describe_training_job": "sagemaker:DescribeTrainingJob",
               "get_secret_value": "secretsmanager:GetSecretValue"}
IMPLIED = {"iam:PassRole", "sagemaker:AddTags"}  # also needed by CreateTrainingJob with a role and tags
USED_BY_SAGEMAKER = {  # what the service itself does with the role
    "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetAuthorizationToken", "ecr:GetDownloadUrlForLayer",
    "logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents",
    "cloudwatch:PutMetricData"}


def policies() -> dict[str, list[dict[str, Any]]]:
    page = (ROOT / "docs/sagemaker.md").read_text(encoding="utf-8")
    found = [json.loads(block)["Statement"] for block in re.findall(r"```json\n(.*?)```", page, re.S)]
    return dict(zip(("submits", "runs", "mlflow"), found, strict=True))


def actions(statements: list[dict[str, Any]]) -> set[str]:
    return {action for statement in statements for action in statement["Action"]}


MLFLOW_FILES = {"mlflow_shipper.py", "mlflow_logging.py", "model_registry.py"}  # their client is MLflow's
MLFLOW_ACTIONS = {  # client method -> action that SageMaker's server checks; files are sent to S3 directly
    "set_terminated": "UpdateRun", "log_artifact": "GetRun", "log_artifacts": "GetRun", "list_artifacts": "GetRun",
    "log_image": "SetTag"}


def aws_permissions() -> set[str]:
    """The permissions of every call to AWS in the code."""
    known, found = S3_CALLS | OTHER_CALLS, set()
    paths = [*(ROOT / "dreambooth").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.name not in MLFLOW_FILES)
    for call in re.findall(r"(?:\bs3|\bclient|_client)\.([a-z0-9]+_[a-z_0-9]+)\b", code):
        if call != "get_paginator":
            found.add(known[call])
    return found | {known[name] for name in re.findall(r'get_paginator\("(\w+)"\)', code)}


def mlflow_permissions() -> set[str]:
    """The permissions of every call of MLflow's client."""
    code = "\n".join((ROOT / "dreambooth/tracking" / name).read_text(encoding="utf-8") for name in sorted(MLFLOW_FILES))
    calls = set(re.findall(r"(?:\bclient|_client)\.([a-z]+_[a-z_]+)\(", code))
    return {f"sagemaker-mlflow:{MLFLOW_ACTIONS.get(call, call.title().replace('_', ''))}" for call in calls}


def test_the_policy_for_a_server_of_sagemakers_allows_what_is_mlflow_permissions() -> None:
    [statement] = policies()["mlflow"]
    assert set(statement["Action"]) == mlflow_permissions()
    assert {"sagemaker-mlflow:LogBatch", "sagemaker-mlflow:GetExperimentByName",
            "sagemaker-mlflow:SetRegisteredModelAlias"} <= mlflow_permissions()


def test_only_those_files_call_mlflow() -> None:
    """The files that `aws_permissions` leaves out are those that `mlflow_permissions` reads."""
    pattern = re.compile(r"MlflowClient|^\s*import mlflow|client: Any, run_id", re.MULTILINE)
    found = {path.name for path in (ROOT / "dreambooth").rglob("*.py")
             if pattern.search(path.read_text(encoding="utf-8"))}
    assert found == MLFLOW_FILES


def test_the_policies_allow_what_the_code_calls_and_no_more() -> None:
    found = policies()
    needed = aws_permissions()
    assert actions(found["submits"]) == (needed - {"secretsmanager:GetSecretValue"}) | IMPLIED
    used_by_a_run = {call for call in needed if call.startswith(("s3:", "secretsmanager:"))}
    assert actions(found["runs"]) == used_by_a_run | USED_BY_SAGEMAKER


def test_the_policies_name_no_wildcard_action_and_nothing_that_deletes() -> None:
    for statements in policies().values():
        assert {action for action in actions(statements) if "*" in action or "Delete" in action} <= {
            "sagemaker-mlflow:DeleteRegisteredModelAlias"}  # the alias of a version, not the version
        for statement in statements:
            if statement["Resource"] == "*":  # these two actions accept no resource
                assert set(statement["Action"]) <= {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}


def test_every_permission_in_a_message_is_one_that_the_code_needs() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "dreambooth").rglob("*.py"))
    named = set(re.findall(r'"((?:s3|sagemaker|secretsmanager):[A-Z]\w+)"', code))
    assert named == aws_permissions()


def test_the_notebooks_commands_compose_and_its_code_compiles() -> None:
    cells = json.loads((ROOT / "examples/sagemaker.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    typed = [shlex.split(re.sub(r"\\\n", "", text).format(BUCKET="s3://b/p", ROLE=ROLE, IMAGE=IMAGE)) for text in code
             if text.startswith("!")]
    sweep = next(words for words in typed if words[2] == "dreambooth.train")
    for hardware in ("g4dn", "g5"):
        words = [re.sub(r"=g4dn,g5|=1e-6,2e-6", f"={hardware}" if "hardware" in word else "=1e-6", word)
                 for word in sweep[3:] if word != "-m"]
        assert request_of(*words)["ResourceConfig"]["InstanceType"] == f"ml.{hardware}.xlarge"
    uploads = [words for words in typed if words[2] == "dreambooth.storage"]
    assert storage_command.parser().parse_args(uploads[0][3:]).uri == "s3://b/p/photos"
    for text in code:
        if not text.startswith("!"):
            compile(text, "cell", "exec")


def test_patterns_with_unicode_classes_are_checked() -> None:
    shape = folders.client("sagemaker").meta.service_model.shape_for("TagValue")
    assert list(request_validation.find_problems("größe 1_a:/=+-@", shape, "x")) == []
    assert list(request_validation.find_problems("a;b", shape, "x"))


def test_waits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (follower.MAX_PAUSE, s3_bucket.ATTEMPTS) == (120.0, 5)
    assert aws_errors.is_network_error(EndpointConnectionError(endpoint_url="x"))
    for kind in (QuotaExceeded, Unreachable):
        assert not issubclass(kind, UserError)
