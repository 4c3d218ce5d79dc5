"""Requests of SageMaker jobs: equal to golden files, priced, and free of what AWS would reject."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from botocore.stub import Stubber

from dreambooth import entrypoint
from dreambooth.cloud import job_preparation, request_validation, secrets, training_job_request
from dreambooth.cloud.job import Job
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.errors import ConfigError, UserError
from dreambooth.storage import folders
from dreambooth.sweeps import hydra_callbacks
from tests.cloud.jobs import GOLDEN, IMAGE, KMS, PHOTOS, ROLE, ROOT, config_of, jobs_of, request_of
from tests.support.warm_python import PYTHON

pytestmark = pytest.mark.usefixtures("environment")

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


@pytest.mark.parametrize("number", ["0.123", "1.2e-05", "-1.43e+02", "12", "3E6"])
def test_a_metric_is_read_with_its_sign_and_exponent(number: str) -> None:
    """SageMaker reads metrics from the log, and its tuner needs the objective."""
    log = f"training 12/300 0:01 loss {number}\nobjective={number}\n"
    found = {name: re.findall(regex, log) for name, regex in training_job_request.METRICS.items()}
    assert found == {"step": ["12"], "loss": [number], "objective": [number]}


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
    assert shown in next(iter(job_preparation.describe_jobs([job])))
    resources = job.request["ResourceConfig"]
    assert (resources["VolumeSizeInGB"], "VolumeKmsKeyId" in resources) == (disk or 9000, disk is None)


def test_the_total_names_the_number_of_jobs_that_it_covers() -> None:
    resources: dict[str, Any] = {"ResourceConfig": {"InstanceCount": 1, "InstanceType": "ml.g5.xlarge"}}
    jobs = [Job(0, "a", ("tracking.uri=https://me:hidden@host",), resources, 1, 2.0, 1.5, 2700),
            Job(1, "b", (), resources, 1, 2.0, 0.25, 450), Job(2, "c", (), resources, 1, None, None, 450)]
    assert next(iter(job_preparation.describe_jobs(jobs))).endswith("tracking.uri=https://host")
    assert list(job_preparation.describe_jobs(jobs[:2]))[-1] == "2 jobs, about $1.75 (estimate: see docs/planner.md)"
    assert list(job_preparation.describe_jobs(jobs))[-1] == (
        "3 jobs, about $1.75 for 2 of them; 1 without a price: type hydra.launcher.price_usd_hour=PRICE "
        "(estimate: see docs/planner.md)")
    in_docker = "".join(job_preparation.describe_jobs(jobs[2:], "docker"))
    assert "price" not in in_docker, "a container on this machine costs nothing"
    assert list(job_preparation.describe_jobs(jobs[2:]))[-1] == (
        "1 job; 1 without a price: type hydra.launcher.price_usd_hour=PRICE")


def test_without_torch_it_says_that_memory_was_not_checked(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(job_preparation, "find_spec", lambda name: None)
    [job] = jobs_of(config_of("hardware=g4dn", *PHOTOS, "hydra.launcher.plan=true"))
    assert "torch is not installed here: it is not checked whether the jobs fit in memory" in capsys.readouterr().out
    assert (job.estimate_usd, job.request["ResourceConfig"]["VolumeSizeInGB"]) == (None, 110)


@pytest.mark.slow
def test_cost_and_volume_of_a_job_come_from_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", PYTHON)
    [job] = jobs_of(config_of("hardware=g4dn", *PHOTOS, "hydra.launcher.plan=true"))
    assert job.estimate_seconds and job.estimate_usd == pytest.approx(job.estimate_seconds / 3600 * 0.7364)
    assert 10 < job.request["ResourceConfig"]["VolumeSizeInGB"] < 110
    assert re.search(r" for \d+\.\d h, about \$\d+\.\d\d ", next(iter(job_preparation.describe_jobs([job]))))


def test_all_jobs_are_checked_before_the_first() -> None:
    with pytest.raises(ConfigError) as caught:
        jobs_of(config_of("hardware=g4dn", "precision=bf16", *PHOTOS),
                config_of("hardware=g4dn", "train.max_train_steps=0", *PHOTOS, number=1))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["job 0", "job 1"]


@pytest.mark.parametrize("words", [
    "+hydra.launcher.environment.MLFLOW_TRACKING_PASSWORD=x", "+hydra.launcher.environment.AWS_SECRET_ACCESS_KEY=x",
    "+hydra.launcher.environment.URL='https://me:hidden@host'", "hydra.launcher.mlflow_uri='https://me:hidden@host'",
    "+hydra.launcher.environment.WANDB_API_KEY=hidden", "+hydra.launcher.environment.URL='https://hidden@host'",
    "+hydra.launcher.environment.HUB=hf_hiddenhiddenhiddenhidden", "+hydra.launcher.environment.HF_TOKEN=hidden",
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
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/team", True),
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-app/app-ABCDEFGHIJKL", True)])
def test_an_mlflow_address_that_jobs_cannot_reach_is_refused(
        address: str, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    if reached:
        assert request_of("hardware=g4dn", *PHOTOS)["Environment"]["MLFLOW_TRACKING_URI"] == address
        return
    with pytest.raises(ConfigError, match=r"cannot reach MLflow .* type hydra\.launcher\.mlflow_uri=https://SERVER"):
        request_of("hardware=g4dn", *PHOTOS)
    with pytest.raises(ConfigError, match=r"type tracking\.uri=https://SERVER"):
        request_of("hardware=g4dn", *PHOTOS, f"tracking.uri='{address}'")
    request = request_of("hardware=g4dn", *PHOTOS, "hydra.launcher.mlflow_uri=null")
    assert "MLFLOW_TRACKING_URI" not in request["Environment"]
    request_of("hardware=g4dn", *PHOTOS, "tracking=none")


@pytest.mark.parametrize("server", ["mlflow-tracking-server/team", "mlflow-app/app-ABCDEFGHIJKL"])
def test_the_arn_of_a_managed_mlflow_server_is_its_address(server: str) -> None:
    arn = f"arn:aws:sagemaker:us-east-1:123456789012:{server}"
    sent = request_of("hardware=g4dn", *PHOTOS, f"hydra.launcher.mlflow_uri={arn}")
    assert sent["Environment"]["MLFLOW_TRACKING_URI"] == arn
    assert sent["HyperParameters"]["tracking.uri"] == "${oc.env:MLFLOW_TRACKING_URI}"


def test_confidential_values_are_not_repeated_in_messages() -> None:
    good = json.loads((GOLDEN / "sagemaker-g4dn-spot.json").read_text())
    [problem] = SageMakerBackend().find_problems(good | {"Environment": {"A": 17}})
    assert problem == "Environment.A must be a string"
    [problem] = SageMakerBackend().find_problems(good | {"Tags": [{"Key": "a", "Value": "hidden;"}]})
    assert problem.startswith("Tags[0].Value is the typed value, which does not match")


def test_a_job_loads_its_credentials_from_secrets_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    client = folders.client("secretsmanager")
    monkeypatch.setenv("DREAMBOOTH_SECRET", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    regions: list[str | None] = []
    monkeypatch.setattr(folders, "client", lambda service, region: regions.append(region) or client)
    with Stubber(client) as stub:
        content = {"SecretString": '{"username": "me", "password": "p", "hf_token": "t"}'}
        stub.add_response("get_secret_value", content, {"SecretId": "mlflow"})
        monkeypatch.setattr(os, "environ", dict(os.environ))
        secrets.load()
        assert [os.environ[key] for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN")] == [
            "me", "p", "t"]
        stub.add_response("get_secret_value", {"SecretString": "not json"}, {"SecretId": "mlflow"})
        with pytest.raises(UserError, match=r"must be a JSON object with username, .*, wandb_api_key, any of"):
            secrets.load()
        arn = "arn:aws-cn:secretsmanager:cn-north-1:123456789012:secret:mlflow-a1b2c3"
        monkeypatch.setenv("DREAMBOOTH_SECRET", arn)
        stub.add_response("get_secret_value", {"SecretString": "{}"}, {"SecretId": arn})
        secrets.load()
    assert regions == [None, None, "cn-north-1"]


def test_a_client_has_the_region_that_sagemaker_sets_in_its_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 reads AWS_DEFAULT_REGION alone."""
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert folders.client("secretsmanager").meta.region_name == "eu-west-1"
    assert folders.client("secretsmanager", region="us-west-2").meta.region_name == "us-west-2"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-2")
    assert folders.client("secretsmanager").meta.region_name == "us-east-2"


def test_job_names_identify_the_run_and_are_valid() -> None:
    name = training_job_request.job_name("my sweep, 2026!", 3, {"a": "1", "b": "2"}, {"model.source": "0a"})
    assert name == training_job_request.job_name(
        "my sweep, 2026!", 3, {"b": "2", "a": "1", "tracking.uri": "x"}, {"model.source": "0a"})
    assert name != training_job_request.job_name("my sweep, 2026!", 3, {"a": "2", "b": "2"}, {"model.source": "0a"})
    assert name != training_job_request.job_name("my sweep, 2026!", 3, {"a": "1", "b": "2"}, {"model.source": "0b"})
    name = training_job_request.job_name("x-" * 60, 10**6, {"a": "1"}, {}, 99)
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name)


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


def test_patterns_with_unicode_classes_are_checked() -> None:
    shape = folders.client("sagemaker").meta.service_model.shape_for("TagValue")
    assert list(request_validation.find_problems("größe 1_a:/=+-@", shape, "x")) == []
    assert list(request_validation.find_problems("a;b", shape, "x"))
