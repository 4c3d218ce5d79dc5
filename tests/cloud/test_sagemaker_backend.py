"""Jobs on SageMaker: what is asked for, how they are followed through every state, what may be called at all.

No call to AWS: botocore's Stubber answers and checks what it is asked, its model of the service checks the requests."""

import csv
import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from botocore.stub import Stubber
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from dreambooth import entrypoint
from dreambooth.cloud import docker_backend, follower, request_validation, secrets, sweep_results, training_job_request
from dreambooth.cloud.docker_backend import Containers
from dreambooth.cloud.follower import Follower
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Busy, Job, Seen, Unreachable
from dreambooth.cloud.sagemaker_backend import TrainingJobs
from dreambooth.config.compose import conf_dir
from dreambooth.container.sagemaker_paths import Places
from dreambooth.errors import ConfigError, Interrupted, UserError
from dreambooth.storage import __main__ as storage_command
from dreambooth.storage import aws_errors, folders, s3_bucket
from dreambooth.sweeps import hydra_callbacks
from hydra_plugins.dreambooth_sagemaker import _core, _prepare
from hydra_plugins.dreambooth_sagemaker.launcher import SageMakerLauncher
from tests.support.s3_server import KEYS, plain, serving

HELD = folders.held
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
    monkeypatch.setattr(folders, "held", lambda uri: folders.Held("0" * 10, folder=True, complete=True))
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    for key in ("DREAMBOOTH_IMAGE", "DREAMBOOTH_ROLE", "DREAMBOOTH_S3", "DREAMBOOTH_SWEEP", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)


def composed(*overrides: str, number: int = 0) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", ["hydra/launcher=sagemaker", *LAUNCHER, *overrides], return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.job.num = number
    return cfg


def jobs_of(*configs: DictConfig, client: Any = None) -> list[Job]:
    _prepare.refuse_secrets(configs, "sweep-1")
    return _prepare.prepared(configs, "sweep-1", TrainingJobs(client or folders.client("sagemaker")), "aws")


def asked(*overrides: str) -> dict[str, Any]:
    return jobs_of(composed(*overrides))[0].request


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
def test_a_request_is_the_golden_one(name: str) -> None:
    told = json.dumps(asked(*CASES[name]), indent=1, sort_keys=True) + "\n"
    path = GOLDEN / f"sagemaker-{name}.json"
    if os.environ.get("DREAMBOOTH_WRITE_GOLDEN") and not os.environ.get("CI"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(told)
    assert told == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_a_golden_request_is_what_botocores_model_allows(name: str) -> None:
    found = json.loads((GOLDEN / f"sagemaker-{name}.json").read_text())
    assert TrainingJobs().problems(found) == []


@pytest.mark.parametrize("change, words", [
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
def test_what_aws_would_refuse_is_found(change: dict[str, Any], words: str) -> None:
    good = json.loads((GOLDEN / "sagemaker-g4dn-spot.json").read_text())
    assert words in TrainingJobs().problems(good | change)[0]


def test_a_missing_part_is_found() -> None:
    good = json.loads((GOLDEN / "sagemaker-g4dn-spot.json").read_text())
    del good["RoleArn"]
    assert TrainingJobs().problems(good) == ["RoleArn is missing"]


def test_each_job_has_the_machine_and_price_of_its_own_hardware() -> None:
    found = jobs_of(composed("hardware=g4dn", *PHOTOS), composed("hardware=g5", *PHOTOS, number=1))
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
    """Where the machine has no disk of its own, the volume is as large as typed and has a key of its own."""
    [job] = jobs_of(composed(*words, *PHOTOS, KMS, "hydra.launcher.volume_gib=9000"))
    assert job.usd_hour == price
    shown = "price unknown" if price is None else f"${price:.4g}/h"
    assert shown in next(iter(_prepare.announced([job])))
    asked_for = job.request["ResourceConfig"]
    assert (asked_for["VolumeSizeInGB"], "VolumeKmsKeyId" in asked_for) == (disk or 9000, disk is None)


def test_the_sum_says_of_how_many_jobs_it_is() -> None:
    resources: dict[str, Any] = {"ResourceConfig": {"InstanceCount": 1, "InstanceType": "ml.g5.xlarge"}}
    jobs = [Job(0, "a", (), resources, 1, 2.0, 1.5, 2700), Job(1, "b", (), resources, 1, 2.0, 0.25, 450),
            Job(2, "c", (), resources, 1, None, None, 450)]
    assert list(_prepare.announced(jobs[:2]))[-1] == "2 jobs, about $1.75 (estimate: see docs/planner.md)"
    assert list(_prepare.announced(jobs))[-1] == (
        "3 jobs, about $1.75 for 2 of them; 1 without a price: type hydra.launcher.price_usd_hour=PRICE "
        "(estimate: see docs/planner.md)")
    assert "price" not in "".join(_prepare.announced(jobs[2:], "docker")), "nobody pays for a container of this machine"
    assert list(_prepare.announced(jobs[2:]))[-1] == (
        "1 jobs; 1 without a price: type hydra.launcher.price_usd_hour=PRICE")


def test_without_torch_it_says_that_nobody_looked_whether_the_jobs_fit(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_prepare, "find_spec", lambda name: None)
    [job] = jobs_of(composed("hardware=g4dn", *PHOTOS, "hydra.launcher.plan=true"))
    assert "torch is not installed here: whether the jobs fit was not looked at" in capsys.readouterr().out
    assert (job.estimate_usd, job.request["ResourceConfig"]["VolumeSizeInGB"]) == (None, 110)


@pytest.mark.slow
def test_the_planner_says_what_a_job_that_fits_costs_and_writes() -> None:
    [job] = jobs_of(composed("hardware=g4dn", *PHOTOS, "hydra.launcher.plan=true"))
    assert job.estimate_seconds and job.estimate_usd == pytest.approx(job.estimate_seconds / 3600 * 0.7364)
    assert 10 < job.request["ResourceConfig"]["VolumeSizeInGB"] < 110
    assert re.search(r" for \d+\.\d h, about \$\d+\.\d\d ", next(iter(_prepare.announced([job]))))


def test_all_jobs_are_checked_before_the_first() -> None:
    with pytest.raises(ConfigError) as caught:
        jobs_of(composed("hardware=g4dn", "precision=bf16", *PHOTOS),
                composed("hardware=g4dn", "train.max_train_steps=0", *PHOTOS, number=1))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["job 0", "job 1"]


def test_a_half_uploaded_base_is_found_before_a_job_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with serving():
        plain().create_bucket(Bucket="bucket")
        plain().put_object(Bucket="bucket", Key="base/model_index.json", Body=b"{}")
        with pytest.raises(ConfigError, match="half uploaded"):
            asked("hardware=g4dn", *PHOTOS, "model.source=s3://bucket/base")


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
def test_a_secret_never_gets_into_a_request_and_stays_nowhere(words: str, tmp_path: Path) -> None:
    """Whatever else is wrong; Hydra has kept the command in multirun.yaml before the launcher is called."""
    kept = tmp_path / "multirun.yaml"
    kept.write_text("typed")
    mistake = words == "train.max_train_steps=0"
    with pytest.raises(ConfigError) as caught:
        asked("hardware=g4dn", f"run_root={tmp_path}", *PHOTOS, words, "train.gradient_accumulation_steps=0")
    assert ("Secrets Manager" in str(caught.value)) is not mistake
    assert "hidden" not in str(caught.value).lower()
    assert kept.exists() is mistake


def test_what_only_sounds_like_a_secret_may_be_sent() -> None:
    sent = asked("hardware=g4dn", *PHOTOS, "+hydra.launcher.environment.TOKENIZERS_PARALLELISM='false'",
                 "hydra.launcher.mlflow_secret=arn:aws:secretsmanager:us-east-1:123456789012:secret:team/mlflow-a1B2c3",
                 "+hydra.launcher.tags.team=art")["Environment"]
    assert sent["TOKENIZERS_PARALLELISM"] == "false"
    assert sent["DREAMBOOTH_SECRET"].endswith("secret:team/mlflow-a1B2c3")


@pytest.mark.parametrize("address, reached", [
    ("http://127.0.0.1:5000", False), ("http://localhost:5000", False), ("http://[::1]:5000", False),
    ("sqlite:///mlflow.db", False), ("file:///runs", False), ("runs/mlruns", False),
    ("https://mlflow.example.com", True), ("http://team-mlflow:5000", True), ("databricks", True),
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/team", True)])
def test_jobs_are_not_sent_to_an_mlflow_of_the_laptop(
        address: str, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    if reached:
        assert asked("hardware=g4dn", *PHOTOS)["Environment"]["MLFLOW_TRACKING_URI"] == address
        return
    with pytest.raises(ConfigError, match=r"do not reach MLflow .* type hydra\.launcher\.mlflow_uri=https://SERVER"):
        asked("hardware=g4dn", *PHOTOS)
    with pytest.raises(ConfigError, match=r"type tracking\.uri=https://SERVER"):
        asked("hardware=g4dn", *PHOTOS, f"tracking.uri='{address}'")
    assert "MLFLOW_TRACKING_URI" not in asked("hardware=g4dn", *PHOTOS, "hydra.launcher.mlflow_uri=null")["Environment"]
    asked("hardware=g4dn", *PHOTOS, "tracking=none")


def test_of_a_server_that_sagemaker_manages_the_arn_is_the_address() -> None:
    arn = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/team"
    sent = asked("hardware=g4dn", *PHOTOS, f"hydra.launcher.mlflow_uri={arn}")
    assert sent["Environment"]["MLFLOW_TRACKING_URI"] == arn
    assert sent["HyperParameters"]["tracking.uri"] == "${oc.env:MLFLOW_TRACKING_URI}"


def test_what_is_refused_of_an_environment_is_not_repeated() -> None:
    good = json.loads((GOLDEN / "sagemaker-g4dn-spot.json").read_text())
    [told] = TrainingJobs().problems(good | {"Environment": {"A": 17}})
    assert told == "Environment.A must be a text, not what was typed"
    [told] = TrainingJobs().problems(good | {"Tags": [{"Key": "a", "Value": "hidden;"}]})
    assert told.startswith("Tags[0].Value is what was typed, which does not match")


def test_a_job_takes_its_credentials_from_secrets_manager(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_job_begun_again_goes_on_from_the_first_ones_checkpoints(stub: Stubber, job: Job) -> None:
    say(stub, job, "Failed", "Failed")
    stub.add_client_error("describe_training_job", "ValidationException", "Requested resource not found.", 400)
    [again] = jobs_of(composed("hardware=g4dn", *PHOTOS, "hydra.launcher.spot=true", "hydra.launcher.resubmit=true"),
                      client=stub.client)
    assert again.name == f"{job.name}-1"
    assert again.request["CheckpointConfig"] == job.request["CheckpointConfig"]


def test_folders_of_the_submitting_machine_are_not_sent() -> None:
    sent = asked("hardware=g4dn", *PHOTOS, "run_root=here", "storage.cache=there")["HyperParameters"]
    assert not sent.keys() & {"run_root", "storage.cache", "dataset", "dataset.instance_dir"}


def test_names_are_the_same_for_the_same_run_and_fit() -> None:
    name = training_job_request.name_of("my sweep, 2026!", 3, {"a": "1", "b": "2"}, {"model.source": "0a"})
    assert name == training_job_request.name_of(
        "my sweep, 2026!", 3, {"b": "2", "a": "1", "tracking.uri": "x"}, {"model.source": "0a"})
    assert name != training_job_request.name_of("my sweep, 2026!", 3, {"a": "2", "b": "2"}, {"model.source": "0a"})
    assert name != training_job_request.name_of("my sweep, 2026!", 3, {"a": "1", "b": "2"}, {"model.source": "0b"})
    name = training_job_request.name_of("x-" * 60, 10**6, {"a": "1"}, {}, 99)
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name)


@pytest.mark.parametrize("mode", ["aws", "docker"])
def test_jobs_are_found_again_from_another_machine_unless_the_photos_are_others(
        mode: str, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(machine: str, photo: bytes, *words: str) -> str:
        folder = tmp_path / machine / f"photos of {machine}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.jpg").write_bytes(photo)
        config = composed("hardware=g4dn", "dataset=folder", f"dataset.instance_dir='{folder}'",
                          "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog",
                          f"run_root={tmp_path}/{machine}/runs", f"storage.cache={tmp_path}/{machine}/cache", *words)
        backend = Containers(tmp_path / "jobs") if mode == "docker" else TrainingJobs()
        return _prepare.prepared([config], "mine", backend, mode)[0].name

    with serving():
        plain().create_bucket(Bucket="bucket")
        mine = name("laptop", b"a")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
        assert name("desktop", b"a") == mine
        assert name("desktop", b"a", "tracking.experiment=other", "hardware.price_usd_hour=2") == mine
        assert name("desktop", b"b") != mine, "the job on the old photos is not the one on the new ones"
        assert name("laptop", b"a", "train.seed=1") != mine


def test_other_photos_at_the_same_place_in_s3_are_another_job() -> None:
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "held", HELD)
        plain().create_bucket(Bucket="bucket")
        names = []
        for body in (b"a", b"a", b"b"):
            plain().put_object(Bucket="bucket", Key="photos/a.jpg", Body=body)
            names.append(jobs_of(composed("hardware=g4dn", *PHOTOS))[0].name)
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
def test_what_is_not_in_s3_is_said_before_anybody_pays(words: list[str], sentence: str) -> None:
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "held", HELD)
        plain().create_bucket(Bucket="bucket")
        plain().put_object(Bucket="bucket", Key="photos/a.jpg", Body=b"a")
        asked("hardware=g4dn", *PHOTOS)
        with pytest.raises(ConfigError) as caught:
            asked("hardware=g4dn", *PHOTOS, *words)
    assert sentence in str(caught.value)


def test_a_base_that_is_one_file_in_s3_goes_by_its_address() -> None:
    """A channel carries folders; the run itself fetches the file."""
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "held", HELD)
        plain().create_bucket(Bucket="bucket")
        for key in ("photos/a.jpg", "base.safetensors"):
            plain().put_object(Bucket="bucket", Key=key, Body=b"a")
        sent = asked("hardware=g4dn", *PHOTOS, "model.source=s3://bucket/base.safetensors")
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
def test_paths_of_this_machine_are_not_sent_to_one_that_is_paid_for(
        key: str, name: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("a {subject}") if path.suffix else path.mkdir()
    with pytest.raises(ConfigError) as caught:
        asked("hardware=g4dn", *PHOTOS, f"{key}={path}", "evaluate.encoder=paper")
    assert sentence in str(caught.value)


def test_what_a_job_finds_by_name_is_sent() -> None:
    words = ["model.vae=stabilityai/sd-vae-ft-mse", "evaluate.prompts=object", "checkpoint.resume=s3://bucket/step-000100",
             "evaluate.lpips=s3://bucket/x.safetensors", "evaluate.reference_dir=s3://bucket/dogs"]
    sent = asked("hardware=g4dn", *PHOTOS, *words)["HyperParameters"]
    assert {f"{key}={value}" for key, value in sent.items()} >= {*words}
    assert "evaluate.prompts" in asked("hardware=g4dn", *PHOTOS, "evaluate.prompts=s3://bucket/p.txt")["HyperParameters"]


def test_trials_are_named_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_callbacks, "_swept", ["train.learning_rate", "train.seed"])
    sent = asked("hardware=g4dn", *PHOTOS, "train.learning_rate=1e-6", "train.seed=2")["HyperParameters"]
    assert sent["tracking.run_name"] == "learning_rate=1e-6 seed=2"
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/hyperparameters.json").write_text(json.dumps(sent))
    shutil.copytree(ROOT / "dreambooth/assets/demo", tmp_path / "input/data/images")
    words = entrypoint.asked(Places(tmp_path), [], None).words()
    assert entrypoint.composed(words)[0].tracking.run_name == "learning_rate=1e-6 seed=2"


def test_a_volume_is_as_large_as_the_plan_says_but_no_larger_than_the_machines_own_disk() -> None:
    settings = training_job_request.Settings(IMAGE, ROLE, "s3://b/p", "ml.g4dn.xlarge")

    def volume(disk: float | None, needed: float | None) -> int:
        body = training_job_request.request(settings, "n", "s", [], {}, disk, needed)
        return int(body["ResourceConfig"]["VolumeSizeInGB"])

    assert [volume(None, 41.2), volume(None, None), volume(116, 200.0), volume(116, 20)] == [52, 110, 116, 30]


def test_local_photos_are_made_complete_in_s3_once_and_not_in_silence(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    words = ["hardware=g4dn", "dataset=folder", f"dataset.instance_dir={tmp_path}/photos",
             "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog"]
    with serving():
        plain().create_bucket(Bucket="bucket")
        found = jobs_of(composed(*words, "train.seed=0"), composed(*words, "train.seed=1", number=1))
        assert re.search(r"^to s3://bucket/sweeps/inputs/photos-\w+ 1/1 ", capsys.readouterr().out, re.M)
        places = {job.request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] for job in found}
        [place] = places
        assert place.startswith("s3://bucket/sweeps/inputs/photos-")
        assert "a.jpg" in (folders.complete(place.rstrip("/")) or {})
    assert "dataset.instance_dir" not in found[0].request["HyperParameters"]


# -- SageMaker's states, by Stubber -------------------------------------------------------------------------------

@pytest.fixture
def job() -> Job:
    [found] = jobs_of(composed("hardware=g4dn", *PHOTOS, "hydra.launcher.spot=true"))
    return found


@pytest.fixture
def stub() -> Iterator[Stubber]:
    client = folders.client("sagemaker")
    with Stubber(client) as found:
        yield found
        found.assert_no_pending_responses()


def told(job: Job, status: str, detail: str, **more: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"TrainingJobName": job.name, "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/x",
            "ModelArtifacts": {"S3ModelArtifacts": f"s3://bucket/sweeps/{job.name}/output/model/"},
            "TrainingJobStatus": status, "SecondaryStatus": detail, "HyperParameters": job.request["HyperParameters"],
            "AlgorithmSpecification": job.request["AlgorithmSpecification"],
            "ResourceConfig": job.request["ResourceConfig"], "StoppingCondition": job.request["StoppingCondition"],
            "CreationTime": now} | more


def say(stub: Stubber, job: Job, status: str, detail: str, **more: Any) -> None:
    stub.add_response("describe_training_job", told(job, status, detail, **more), {"TrainingJobName": job.name})


def created(stub: Stubber, job: Job) -> None:
    """The exact request must come."""
    stub.add_response("create_training_job", {
        "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/x"}, job.request)


def followed(stub: Stubber, *jobs: Job, sleeps: list[float] | None = None, **options: Any) -> list[Seen]:
    waits = sleeps if sleeps is not None else []
    follower = Follower(TrainingJobs(stub.client), jobs, **({
        "max_parallel": 4, "poll_seconds": 20, "stop_on_interrupt": False, "again": "AGAIN", "sleep": waits.append}
        | options))
    return follower.run()


def metrics(step: float, loss: float) -> list[dict[str, Any]]:
    now = datetime.now(UTC)
    return [{"MetricName": "step", "Value": step, "Timestamp": now},
            {"MetricName": "loss", "Value": loss, "Timestamp": now}]


def test_in_progress_interrupted_restarting_completed(
        stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 0.25, "step": 800, "uri": uri})
    created(stub, job)
    start = datetime.now(UTC) - timedelta(hours=2)
    say(stub, job, "InProgress", "Pending")
    say(stub, job, "InProgress", "Training", TrainingStartTime=start, FinalMetricDataList=metrics(100, 0.3))
    say(stub, job, "InProgress", "Interrupted", TrainingStartTime=start)
    say(stub, job, "InProgress", "Restarting", TrainingStartTime=start)
    say(stub, job, "InProgress", "Uploading", TrainingStartTime=start, FinalMetricDataList=metrics(800, 0.2))
    say(stub, job, "Completed", "Completed", TrainingTimeInSeconds=7200, BillableTimeInSeconds=1800)
    [end] = followed(stub, job)
    assert (end.status, end.step, end.loss) == (COMPLETED, 800, 0.2)
    assert end.result["uri"] == f"s3://bucket/sweeps/{job.name}/output/model/result.json"
    assert sweep_results.objective(end) == 0.25
    assert end.usd(job) == pytest.approx(0.7364 / 2), "a spot job is billed by its billable seconds"
    told_of = [line for line in capsys.readouterr().out.splitlines() if line.startswith(job.name)]
    assert told_of[:7] == [f"{job.name}  InProgress  {detail}" for detail in (
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
    created(stub, job)
    say(stub, job, "Stopping", "Stopping")
    say(stub, job, status, detail, BillableTimeInSeconds=60, **more)
    [end] = followed(stub, job)
    assert (end.status, end.reason) == (FAILED if status == "Failed" else STOPPED, reason)
    assert sweep_results.objective(end) is None


def test_throttled_is_asked_again_more_slowly(stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    stub.add_client_error("create_training_job", "ThrottlingException", "Rate exceeded", 400)
    created(stub, job)
    for _ in range(3):
        stub.add_client_error("describe_training_job", "ThrottlingException", "Rate exceeded", 400)
    say(stub, job, "InProgress", "Training")
    say(stub, job, "Completed", "Completed")
    waits: list[float] = []
    [end] = followed(stub, job, sleeps=waits)
    assert end.status == COMPLETED
    assert waits == [40, 20, 40, 80, 120, 20]


class Offline:
    """A client whose network is gone for some calls."""

    def __init__(self, client: Any, dead: set[int]) -> None:
        self._client, self._dead, self.count = client, dead, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name not in ("create_training_job", "describe_training_job"):
            return real

        def call(**words: Any) -> Any:
            self.count += 1
            if self.count in self._dead:
                raise EndpointConnectionError(endpoint_url="https://sagemaker")
            return real(**words)

        return call


def test_a_lost_network_loses_no_job(stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    created(stub, job)
    say(stub, job, "InProgress", "Training")
    say(stub, job, "Completed", "Completed")
    backend = TrainingJobs(Offline(stub.client, {2, 3, 4, 6}))
    [end] = Follower(backend, [job], max_parallel=1, poll_seconds=1, stop_on_interrupt=False, again="AGAIN",
                     sleep=lambda seconds: None).run()
    assert end.status == COMPLETED
    assert capsys.readouterr().out.count("AWS does not answer") == 2


def test_a_network_that_stays_away_leaves_the_jobs_running(stub: Stubber, job: Job) -> None:
    created(stub, job)
    clock = iter(range(0, 10**6, 1000))
    backend = TrainingJobs(Offline(stub.client, set(range(2, 100))))
    with pytest.raises(UserError, match="1 jobs run on: AGAIN"):
        Follower(backend, [job], max_parallel=1, poll_seconds=1, stop_on_interrupt=False, again="AGAIN",
                 sleep=lambda seconds: None, clock=lambda: next(clock)).run()


def test_an_answer_that_was_lost_does_not_begin_the_job_twice(stub: Stubber, job: Job,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    stub.add_client_error("create_training_job", "ResourceInUse", "Training job names must be unique", 400)
    say(stub, job, "InProgress", "Training")
    say(stub, job, "Completed", "Completed")
    [end] = followed(stub, job)
    assert end.status == COMPLETED


def test_another_job_of_that_name_is_not_taken_for_ours(stub: Stubber, job: Job) -> None:
    stub.add_client_error("create_training_job", "ResourceInUse", "Training job names must be unique", 400)
    say(stub, job, "InProgress", "Training", HyperParameters=job.request["HyperParameters"] | {"hardware": "g5"})
    [end] = followed(stub, job)
    assert end.status == FAILED
    assert "with another hardware: type another hydra.launcher.sweep=NAME" in end.reason


def test_a_job_is_ours_wherever_its_metrics_go(stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun from a shell with MLFLOW_TRACKING_URI, followed from one without."""
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    theirs = job.request["HyperParameters"] | {
        "tracking.uri": "${oc.env:MLFLOW_TRACKING_URI}", "tracking.run_name": "x"}
    stub.add_client_error("create_training_job", "ResourceInUse", "Training job names must be unique", 400)
    say(stub, job, "InProgress", "Training", HyperParameters=theirs)
    say(stub, job, "Completed", "Completed", HyperParameters=theirs)
    [end] = followed(stub, job)
    assert end.status == COMPLETED


def test_a_full_quota_waits_for_our_own_jobs_and_else_says_so(stub: Stubber, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    one, two = jobs_of(composed("hardware=g4dn", *PHOTOS), composed("hardware=g4dn", "train.seed=1", *PHOTOS, number=1))
    created(stub, one)
    stub.add_client_error("create_training_job", "ResourceLimitExceeded", "quota", 400)
    say(stub, one, "Completed", "Completed")
    created(stub, two)
    say(stub, two, "Completed", "Completed")
    assert [end.status for end in followed(stub, one, two)] == [COMPLETED, COMPLETED]
    stub.add_client_error("create_training_job", "ResourceLimitExceeded", "quota", 400)
    [end] = followed(stub, one)
    assert "Service Quotas" in end.reason


def test_one_that_may_not_be_created_fails_alone(stub: Stubber, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_json", lambda uri: {"objective": 1})
    one, two = jobs_of(composed("hardware=g4dn", *PHOTOS), composed("hardware=g4dn", "train.seed=1", *PHOTOS, number=1))
    stub.add_client_error("create_training_job", "AccessDeniedException", "no", 403)
    created(stub, two)
    say(stub, two, "Completed", "Completed")
    first, second = followed(stub, one, two)
    assert (first.status, second.status) == (FAILED, COMPLETED)
    assert first.reason.startswith("no permission for sagemaker:CreateTrainingJob")


def test_at_most_so_many_at_a_time(job: Job) -> None:
    class Counting:
        def __init__(self) -> None:
            self.running: dict[str, int] = {}
            self.most = 0

        def submit(self, job: Job) -> Seen:
            self.running[job.name] = 2
            self.most = max(self.most, len(self.running))
            return Seen(RUNNING)

        def look(self, job: Job) -> Seen:
            self.running[job.name] -= 1
            if self.running[job.name]:
                return Seen(RUNNING)
            del self.running[job.name]
            return Seen(COMPLETED)

    counting: Any = Counting()
    jobs = [Job(i, f"j{i}", (), {}, 1) for i in range(7)]
    ends = Follower(counting, jobs, max_parallel=3, poll_seconds=0, stop_on_interrupt=False, again="",
                    sleep=lambda seconds: None).run()
    assert (counting.most, [end.status for end in ends]) == (3, [COMPLETED] * 7)


@pytest.mark.parametrize("stop", [True, False])
def test_ctrl_c_stops_or_leaves_the_jobs_as_told(stub: Stubber, job: Job, stop: bool) -> None:
    created(stub, job)
    if stop:
        stub.add_response("stop_training_job", {}, {"TrainingJobName": job.name})

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        followed(stub, job, stop_on_interrupt=stop, sleep=interrupted)
    told = str(caught.value)
    if stop:
        assert told == "1 jobs were told to save and stop"
    else:
        assert "1 jobs run on: AGAIN; to stop them type" in told
        assert f"aws sagemaker stop-training-job --training-job-name {job.name}" in told


def test_until_its_end_a_job_shows_its_cost_so_far(stub: Stubber, job: Job) -> None:
    say(stub, job, "InProgress", "Restarting", TrainingTimeInSeconds=3600, BillableTimeInSeconds=60)
    say(stub, job, "Stopped", "Stopped", TrainingTimeInSeconds=3600, BillableTimeInSeconds=1800)
    backend = TrainingJobs(stub.client)
    assert [follower.row(job, backend.look(job))[4] for _ in range(2)] == ["$0.74 so far", "$0.37"]


def test_a_result_that_cannot_be_read_is_a_failure(stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uri: str) -> dict[str, Any]:
        raise UserError("there is nothing")

    monkeypatch.setattr(folders, "read_json", missing)
    created(stub, job)
    say(stub, job, "Completed", "Completed", BillableTimeInSeconds=60)
    [end] = [sweep_results.settled(seen) for seen in followed(stub, job)]
    assert end.status == FAILED
    assert "result.json cannot be read" in end.reason


def test_what_failed_before_is_found_to_be_begun_again(stub: Stubber, job: Job) -> None:
    say(stub, job, "Failed", "Failed")
    stub.add_client_error("describe_training_job", "ValidationException", "Requested resource not found.", 400)
    backend = TrainingJobs(stub.client)
    assert [backend.ended_badly(job.name), backend.ended_badly(job.name)] == [True, False]


# -- results -----------------------------------------------------------------------------------------------------

def test_results_are_a_csv_with_the_best_first_and_a_run_in_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    jobs = [Job(i, f"j{i}", (f"train.seed={i}",), {}, 1, usd_hour=2.0) for i in range(3)]
    ends = [Seen(COMPLETED, billed=1800, result={"objective": 0.5}), Seen(FAILED, billed=0, reason="no, it did not"),
            Seen(COMPLETED, billed=3600, result={"objective": 0.25})]
    rows = sweep_results.rows(jobs, ends)
    path = sweep_results.write(tmp_path, "mine", rows)
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert [(row["job"], row["objective"], row["billed_usd"], row["train.seed"]) for row in found] == [
        ("j2", "0.25", "2.0", "2"), ("j0", "0.5", "1.0", "0"), ("j1", "", "0.0", "1")]
    drawn = sweep_results.draw(tmp_path, "mine", sweep_results.axes(rows))
    assert json.loads(drawn.read_text())["axes"] == {"seed": ["2", "0"], "objective": [0.25, 0.5]}
    sweep_results.track(path, "mine", rows, "mlflow", None, "sweeps", tmp_path, drawn, here=False)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sweeps")
    [run] = client.search_runs([experiment.experiment_id], "tags.sweep = 'mine'")
    assert (run.data.metrics["objective"], run.data.metrics["failed"], run.info.status) == (0.25, 1, "FAILED")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {path.name, drawn.name}
    assert "dreambooth.compare" not in run.data.tags["mlflow.note.content"], "there are no run folders here"


@pytest.mark.parametrize("mode, typed, uri", [
    ("aws", [], "https://mlflow.example.com"), ("docker", [], "https://mlflow.example.com"), ("local", [], None),
    ("aws", ["tracking.uri=https://other.example.com"], "https://other.example.com")])
def test_a_sweep_is_told_of_where_its_trials_are(
        mode: str, typed: list[str], uri: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sweep_results, "track", lambda *words, **more: seen.append((words[4], more["here"])))
    config = composed("hardware=g4dn", f"run_root={tmp_path}", *PHOTOS,
                      "hydra.launcher.mlflow_uri=https://mlflow.example.com", *typed)
    launcher: Any = SageMakerLauncher(mode=mode, sweep="mine")
    launcher.config = config
    _core._report(launcher, [Job(0, "j0", (), {}, 1)], [Seen(COMPLETED, result={"objective": 0.5})], config)
    assert seen == [(uri, mode == "local")]


# -- containers on this machine -----------------------------------------------------------------------------------

ENGINE = """#!/bin/sh
# Stands for docker: reads the mounts, does what a training image does.
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


def test_containers_get_what_sagemaker_gives_and_one_may_fail(engine: str, tmp_path: Path) -> None:
    """Six jobs; the engine is a stand-in, the image is tried elsewhere."""
    backend = Containers(tmp_path / "jobs")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"a")
    words = ["hardware=g4dn", "dataset=folder", f"dataset.instance_dir={photos}", "dataset.instance_prompt=a zwx dog",
             "dataset.class_prompt=a dog"]
    configs = [composed(*words, f"train.seed={i}", number=i) for i in range(6)]
    jobs = _prepare.prepared(configs, "six", backend, "docker")
    ends = [sweep_results.settled(seen) for seen in Follower(
        backend, jobs, max_parallel=2, poll_seconds=0.05, stop_on_interrupt=False, again="").run()]
    assert [end.status for end in ends] == [COMPLETED] * 3 + [FAILED] + [COMPLETED] * 2
    assert ends[3].reason == "exit code 1: photo.jpg is broken"
    assert (ends[0].step, ends[0].loss, sweep_results.objective(ends[0])) == (2, 0.125, 0.5)
    config = tmp_path / "jobs" / jobs[0].name / "input/config"
    assert json.loads((config / "hyperparameters.json").read_text())["train.seed"] == "0"
    assert list(json.loads((config / "inputdataconfig.json").read_text())) == ["images"]
    assert json.loads((config / "resourceconfig.json").read_text())["hosts"] == ["algo-1"]


@pytest.mark.parametrize(("uri", "words"), [
    ("http://127.0.0.1:5000", ["--network", "host"]), ("http://localhost:5000", ["--network", "host"]),
    ("https://mlflow.example.com", []), ("http://[::1]:5000", ["--network", "host"]),
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/x", [])])
def test_a_container_reaches_a_server_of_this_machine(uri: str, words: list[str]) -> None:
    assert docker_backend.network({"MLFLOW_TRACKING_URI": uri, "DREAMBOOTH_SWEEP": "six"}) == words


def test_without_an_engine_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it" in docker_backend.Containers(tmp_path).problems({})[0]


# -- permissions --------------------------------------------------------------------------------------------------

S3_CALLS = {"get_object": "s3:GetObject", "head_object": "s3:GetObject", "put_object": "s3:PutObject",
            "list_objects_v2": "s3:ListBucket", "list_multipart_uploads": "s3:ListBucketMultipartUploads",
            "list_parts": "s3:ListMultipartUploadParts", "create_multipart_upload": "s3:PutObject",
            "upload_part": "s3:PutObject", "complete_multipart_upload": "s3:PutObject"}
OTHER_CALLS = {"create_training_job": "sagemaker:CreateTrainingJob", "stop_training_job": "sagemaker:StopTrainingJob",
               "describe_training_job": "sagemaker:DescribeTrainingJob",
               "get_secret_value": "secretsmanager:GetSecretValue"}
BESIDE = {"iam:PassRole", "sagemaker:AddTags"}  # what CreateTrainingJob asks for with a role and tags
OF_SAGEMAKER = {  # what the service itself does in the role's name
    "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetAuthorizationToken", "ecr:GetDownloadUrlForLayer",
    "logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents",
    "cloudwatch:PutMetricData"}


def policies() -> dict[str, list[dict[str, Any]]]:
    page = (ROOT / "docs/sagemaker.md").read_text(encoding="utf-8")
    found = [json.loads(block)["Statement"] for block in re.findall(r"```json\n(.*?)```", page, re.S)]
    return dict(zip(("submits", "runs", "mlflow"), found, strict=True))


def actions(statements: list[dict[str, Any]]) -> set[str]:
    return {action for statement in statements for action in statement["Action"]}


MLFLOWS = {"shipping.py", "logged.py", "registry.py", "flavour.py"}  # their client is MLflow's
OF_MLFLOW = {  # its client's call -> what SageMaker's server asks for; files go to S3 past it, by the run's address
    "set_terminated": "UpdateRun", "log_artifact": "GetRun", "log_artifacts": "GetRun", "list_artifacts": "GetRun",
    "log_image": "SetTag"}


def called() -> set[str]:
    """The permissions of every call to AWS in the code."""
    known, found = S3_CALLS | OTHER_CALLS, set()
    paths = [*(ROOT / "dreambooth").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.name not in MLFLOWS)
    for call in re.findall(r"(?:\bs3|\bclient|_client)\.([a-z0-9]+_[a-z_0-9]+)\b", code):
        if call != "get_paginator":
            found.add(known[call])
    return found | {known[name] for name in re.findall(r'get_paginator\("(\w+)"\)', code)}


def told_to_mlflow() -> set[str]:
    """The permissions of every call of MLflow's client."""
    code = "\n".join((ROOT / "dreambooth" / name).read_text(encoding="utf-8") for name in sorted(MLFLOWS))
    calls = set(re.findall(r"(?:\bclient|_client|_mlflow)\.([a-z]+_[a-z_]+)\(", code))
    return {f"sagemaker-mlflow:{OF_MLFLOW.get(call, call.title().replace('_', ''))}" for call in calls}


def test_the_policy_for_a_server_of_sagemakers_allows_what_is_told_to_mlflow() -> None:
    [statement] = policies()["mlflow"]
    assert set(statement["Action"]) == told_to_mlflow()
    assert {"sagemaker-mlflow:LogBatch", "sagemaker-mlflow:GetExperimentByName",
            "sagemaker-mlflow:SetRegisteredModelAlias"} <= told_to_mlflow()


def test_only_those_files_talk_to_mlflow() -> None:
    """What `called` leaves out is what the test above reads."""
    told = re.compile(r"MlflowClient|^\s*import mlflow|client: Any, run_id", re.MULTILINE)
    found = {path.name for path in (ROOT / "dreambooth").rglob("*.py") if told.search(path.read_text(encoding="utf-8"))}
    assert found == MLFLOWS


def test_the_policies_allow_what_the_code_calls_and_no_more() -> None:
    found = policies()
    ours = called()
    assert actions(found["submits"]) == (ours - {"secretsmanager:GetSecretValue"}) | BESIDE
    of_a_run = {call for call in ours if call.startswith(("s3:", "secretsmanager:"))}
    assert actions(found["runs"]) == of_a_run | OF_SAGEMAKER


def test_the_policies_name_no_wildcard_action_and_nothing_that_deletes() -> None:
    for statements in policies().values():
        assert {action for action in actions(statements) if "*" in action or "Delete" in action} <= {
            "sagemaker-mlflow:DeleteRegisteredModelAlias"}  # of a version that is no candidate any more; it stays
        for statement in statements:
            if statement["Resource"] == "*":  # these two know no resource
                assert set(statement["Action"]) <= {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}


def test_every_sentence_about_a_permission_names_one_of_the_policies() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "dreambooth").rglob("*.py"))
    named = set(re.findall(r'"((?:s3|sagemaker|secretsmanager):[A-Z]\w+)"', code))
    assert named == called()


def test_the_notebooks_commands_compose_and_its_python_is_python() -> None:
    cells = json.loads((ROOT / "examples/sagemaker.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    typed = [shlex.split(re.sub(r"\\\n", "", text).format(BUCKET="s3://b/p", ROLE=ROLE, IMAGE=IMAGE)) for text in code
             if text.startswith("!")]
    sweep = next(words for words in typed if words[2] == "dreambooth.train")
    for hardware in ("g4dn", "g5"):
        words = [re.sub(r"=g4dn,g5|=1e-6,2e-6", f"={hardware}" if "hardware" in word else "=1e-6", word)
                 for word in sweep[3:] if word != "-m"]
        assert asked(*words)["ResourceConfig"]["InstanceType"] == f"ml.{hardware}.xlarge"
    uploads = [words for words in typed if words[2] == "dreambooth.storage"]
    assert storage_command.parser().parse_args(uploads[0][3:]).uri == "s3://b/p/photos"
    for text in code:
        if not text.startswith("!"):
            compile(text, "cell", "exec")


def test_limits_know_the_classes_of_unicode_that_python_does_not() -> None:
    shape = folders.client("sagemaker").meta.service_model.shape_for("TagValue")
    assert list(request_validation.problems("größe 1_a:/=+-@", shape, "x")) == []
    assert list(request_validation.problems("a;b", shape, "x"))


def test_nothing_here_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (follower.SLOWEST, s3_bucket.ATTEMPTS) == (120.0, 5)
    assert aws_errors.no_network(EndpointConnectionError(endpoint_url="x"))
    for kind in (Busy, Unreachable):
        assert not issubclass(kind, UserError)
