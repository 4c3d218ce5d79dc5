"""Jobs on SageMaker: what is asked for, how they are followed through every state, what may be called at all.

No call to AWS: botocore's Stubber answers and checks what it is asked, its model of the service checks the requests."""

import csv
import json
import os
import re
import shlex
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
from s3_server import KEYS, plain, serving

from dreambooth import aws_errors, bucket, storage
from dreambooth.cloud import docker, follow, limits, request, results, secrets
from dreambooth.cloud.docker import Containers
from dreambooth.cloud.follow import Follower
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Busy, Job, Seen, Unreachable
from dreambooth.cloud.training_jobs import TrainingJobs
from dreambooth.config import conf_dir
from dreambooth.errors import ConfigError, Interrupted, UserError
from hydra_plugins.dreambooth_sagemaker import _prepare

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden")
ROLE = "arn:aws:iam::123456789012:role/dreambooth"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/dreambooth@sha256:" + "0" * 64
LAUNCHER = [f"hydra.launcher.role={ROLE}", f"hydra.launcher.image={IMAGE}", "hydra.launcher.s3=s3://bucket/sweeps",
            "hydra.launcher.plan=false"]
PHOTOS = ["dataset=s3", "dataset.instance_dir=s3://bucket/photos", "dataset.instance_prompt=a photo of a zwx dog",
          "dataset.class_prompt=a photo of a dog"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prepare, "whole", lambda uri: True)
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
    return _prepare.prepared(configs, "sweep-1", TrainingJobs(client or storage.client("sagemaker")), "aws")


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
    "multi-gpu": ["hardware=g5", *PHOTOS, "hardware.instance_type=ml.g5.12xlarge", "hardware.price_usd_hour=7.09",
                  "hardware.disk_gib=3800", "hydra.launcher.instance_count=2", "hydra.launcher.keep_alive_minutes=30"],
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


def test_the_price_of_another_instance_is_not_guessed() -> None:
    [job] = jobs_of(composed("hardware=g5", "hardware.instance_type=ml.g5.12xlarge", *PHOTOS))
    assert job.usd_hour is None
    assert "price unknown" in next(iter(_prepare.announced([job])))


def test_all_jobs_are_checked_before_the_first() -> None:
    with pytest.raises(ConfigError) as caught:
        jobs_of(composed("hardware=g4dn", "precision=bf16", *PHOTOS),
                composed("hardware=g4dn", "train.max_train_steps=0", *PHOTOS, number=1))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["job 0", "job 1"]


def test_a_half_uploaded_base_is_found_before_a_job_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with serving():
        plain().create_bucket(Bucket="bucket")
        plain().put_object(Bucket="bucket", Key="base/model_index.json", Body=b"{}")
        with pytest.raises(ConfigError, match="half uploaded"):
            asked("hardware=g4dn", *PHOTOS, "model.source=s3://bucket/base")


@pytest.mark.parametrize("words", [
    "+hydra.launcher.environment.MLFLOW_TRACKING_PASSWORD=x", "+hydra.launcher.environment.AWS_SECRET_ACCESS_KEY=x",
    "+hydra.launcher.environment.URL='https://me:secret@host'", "hydra.launcher.mlflow_uri='https://me:secret@host'",
])
def test_a_secret_never_gets_into_a_request(words: str) -> None:
    with pytest.raises(ConfigError, match="Secrets Manager"):
        asked("hardware=g4dn", *PHOTOS, words)


def test_a_job_takes_its_credentials_from_secrets_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    client = storage.client("secretsmanager")
    monkeypatch.setenv("DREAMBOOTH_SECRET", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.setattr(storage, "client", lambda service: client)
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
    name = request.name_of("my sweep, 2026!", 3, ["a=1"])
    assert name == request.name_of("my sweep, 2026!", 3, ["a=1"])
    assert name != request.name_of("my sweep, 2026!", 3, ["a=2"])
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", request.name_of("x-" * 60, 10**6, ["a=1"], 99))


def test_a_volume_is_as_large_as_the_plan_says_but_no_larger_than_the_machines_own_disk() -> None:
    settings = request.Settings(IMAGE, ROLE, "s3://b/p", "ml.g4dn.xlarge")

    def volume(disk: float | None, needed: float | None) -> int:
        return int(request.request(settings, "n", "s", [], {}, disk, needed)["ResourceConfig"]["VolumeSizeInGB"])

    assert [volume(None, 41.2), volume(None, None), volume(116, 200.0), volume(116, 20)] == [52, 110, 116, 30]


def test_local_photos_are_made_complete_in_s3_once(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    words = ["hardware=g4dn", "dataset=folder", f"dataset.instance_dir={tmp_path}/photos",
             "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog"]
    with serving():
        plain().create_bucket(Bucket="bucket")
        found = jobs_of(composed(*words, "train.seed=0"), composed(*words, "train.seed=1", number=1))
        places = {job.request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] for job in found}
        [place] = places
        assert place.startswith("s3://bucket/sweeps/inputs/photos-")
        assert "a.jpg" in (storage.complete(place.rstrip("/")) or {})
    assert "dataset.instance_dir" not in found[0].request["HyperParameters"]


# -- SageMaker's states, by Stubber -------------------------------------------------------------------------------

@pytest.fixture
def job() -> Job:
    [found] = jobs_of(composed("hardware=g4dn", *PHOTOS, "hydra.launcher.spot=true"))
    return found


@pytest.fixture
def stub() -> Iterator[Stubber]:
    client = storage.client("sagemaker")
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
    monkeypatch.setattr(storage, "read_json", lambda uri: {"objective": 0.25, "step": 800, "uri": uri})
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
    assert results.objective(end) == 0.25
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
    assert results.objective(end) is None


def test_throttled_is_asked_again_more_slowly(stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "read_json", lambda uri: {"objective": 1})
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
    monkeypatch.setattr(storage, "read_json", lambda uri: {"objective": 1})
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
    monkeypatch.setattr(storage, "read_json", lambda uri: {"objective": 1})
    stub.add_client_error("create_training_job", "ResourceInUse", "Training job names must be unique", 400)
    say(stub, job, "InProgress", "Training")
    say(stub, job, "Completed", "Completed")
    [end] = followed(stub, job)
    assert end.status == COMPLETED


def test_another_job_of_that_name_is_not_taken_for_ours(stub: Stubber, job: Job) -> None:
    stub.add_client_error("create_training_job", "ResourceInUse", "Training job names must be unique", 400)
    say(stub, job, "InProgress", "Training", HyperParameters={"hardware": "g5"})
    [end] = followed(stub, job)
    assert (end.status, "type another hydra.launcher.sweep=NAME" in end.reason) == (FAILED, True)


def test_a_full_quota_waits_for_our_own_jobs_and_else_says_so(stub: Stubber, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "read_json", lambda uri: {"objective": 1})
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
    monkeypatch.setattr(storage, "read_json", lambda uri: {"objective": 1})
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
    assert [follow.row(job, backend.look(job))[4] for _ in range(2)] == ["$0.74 so far", "$0.37"]


def test_a_result_that_cannot_be_read_is_a_failure(stub: Stubber, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uri: str) -> dict[str, Any]:
        raise UserError("there is nothing")

    monkeypatch.setattr(storage, "read_json", missing)
    created(stub, job)
    say(stub, job, "Completed", "Completed", BillableTimeInSeconds=60)
    [end] = [results.settled(seen) for seen in followed(stub, job)]
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
    rows = results.rows(jobs, ends)
    path = results.write(tmp_path, "mine", rows)
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert [(row["job"], row["objective"], row["billed_usd"], row["train.seed"]) for row in found] == [
        ("j2", "0.25", "2.0", "2"), ("j0", "0.5", "1.0", "0"), ("j1", "", "0.0", "1")]
    results.track(path, "mine", rows, "mlflow", None, "sweeps", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sweeps")
    [run] = client.search_runs([experiment.experiment_id], "tags.sweep = 'mine'")
    assert (run.data.metrics["objective"], run.data.metrics["failed"], run.info.status) == (0.25, 1, "FAILED")


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
    words = ["hardware=g4dn", "dataset=folder", f"dataset.instance_dir={photos}", "dataset.instance_prompt=a zwx dog",
             "dataset.class_prompt=a dog"]
    configs = [composed(*words, f"train.seed={i}", number=i) for i in range(6)]
    jobs = _prepare.prepared(configs, "six", backend, "docker")
    ends = [results.settled(seen) for seen in Follower(
        backend, jobs, max_parallel=2, poll_seconds=0.05, stop_on_interrupt=False, again="").run()]
    assert [end.status for end in ends] == [COMPLETED] * 3 + [FAILED] + [COMPLETED] * 2
    assert ends[3].reason == "exit code 1: photo.jpg is broken"
    assert (ends[0].step, ends[0].loss, results.objective(ends[0])) == (2, 0.125, 0.5)
    config = tmp_path / "jobs" / jobs[0].name / "input/config"
    assert json.loads((config / "hyperparameters.json").read_text())["train.seed"] == "0"
    assert list(json.loads((config / "inputdataconfig.json").read_text())) == ["images"]
    assert json.loads((config / "resourceconfig.json").read_text())["hosts"] == ["algo-1"]


@pytest.mark.parametrize(("uri", "words"), [
    ("http://127.0.0.1:5000", ["--network", "host"]), ("http://localhost:5000", ["--network", "host"]),
    ("https://mlflow.example.com", []), ("http://[::1]:5000", ["--network", "host"]),
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/x", [])])
def test_a_container_reaches_a_server_of_this_machine(uri: str, words: list[str]) -> None:
    assert docker.network({"MLFLOW_TRACKING_URI": uri, "DREAMBOOTH_SWEEP": "six"}) == words


def test_without_an_engine_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it" in docker.Containers(tmp_path).problems({})[0]


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
    submits, runs = (json.loads(block)["Statement"] for block in re.findall(r"```json\n(.*?)```", page, re.S)[:2])
    return {"submits": submits, "runs": runs}


def actions(statements: list[dict[str, Any]]) -> set[str]:
    return {action for statement in statements for action in statement["Action"]}


MLFLOWS = {"shipping.py", "logged.py", "registry.py", "flavour.py"}  # their client is MLflow's


def called() -> set[str]:
    """The permissions of every call to AWS in the code."""
    known, found = S3_CALLS | OTHER_CALLS, set()
    paths = [*(ROOT / "dreambooth").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.name not in MLFLOWS)
    for call in re.findall(r"(?:\bs3|\bclient|_client)\.([a-z0-9]+_[a-z_0-9]+)\b", code):
        if call != "get_paginator":
            found.add(known[call])
    return found | {known[name] for name in re.findall(r'get_paginator\("(\w+)"\)', code)}


def test_the_policies_allow_what_the_code_calls_and_no_more() -> None:
    found = policies()
    ours = called()
    assert actions(found["submits"]) == (ours - {"secretsmanager:GetSecretValue"}) | BESIDE
    of_a_run = {call for call in ours if call.startswith(("s3:", "secretsmanager:"))}
    assert actions(found["runs"]) == of_a_run | OF_SAGEMAKER


def test_the_policies_name_no_wildcard_action_and_nothing_that_deletes() -> None:
    for statements in policies().values():
        assert not [action for action in actions(statements) if "*" in action or "Delete" in action]
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
    assert storage.parser().parse_args(uploads[0][3:]).uri == "s3://b/p/photos"
    for text in code:
        if not text.startswith("!"):
            compile(text, "cell", "exec")


def test_limits_know_the_classes_of_unicode_that_python_does_not() -> None:
    shape = storage.client("sagemaker").meta.service_model.shape_for("TagValue")
    assert list(limits.problems("größe 1_a:/=+-@", shape, "x")) == []
    assert list(limits.problems("a;b", shape, "x"))


def test_nothing_here_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (follow.SLOWEST, bucket.ATTEMPTS) == (120.0, 5)
    assert aws_errors.no_network(EndpointConnectionError(endpoint_url="x"))
    for kind in (Busy, Unreachable):
        assert not issubclass(kind, UserError)
