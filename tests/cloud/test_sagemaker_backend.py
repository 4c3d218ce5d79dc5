"""Jobs on SageMaker, followed through every state by botocore's Stubber, and the table of their results."""

import csv
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from botocore.stub import Stubber

from dreambooth.cloud import follower, sweep_results
from dreambooth.cloud.follower import Follower
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Job, JobState, QuotaExceeded, Unreachable
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.errors import Interrupted, UserError
from dreambooth.storage import aws_errors, folders, s3_bucket
from hydra_plugins.dreambooth_sagemaker import _core
from hydra_plugins.dreambooth_sagemaker.launcher import SageMakerLauncher
from tests.cloud.jobs import PHOTOS, config_of, jobs_of

pytestmark = pytest.mark.usefixtures("environment")


def test_a_resubmitted_job_resumes_from_the_first_attempts_checkpoints(stub: Stubber, job: Job) -> None:
    expect_poll(stub, job, "Failed", "Failed")
    stub.add_client_error("describe_training_job", "ValidationException", "Requested resource not found.", 400)
    [again] = jobs_of(config_of("hardware=g4dn", *PHOTOS, "hydra.launcher.spot=true", "hydra.launcher.resubmit=true"),
                      client=stub.client)
    assert again.name == f"{job.name}-1"
    assert again.request["CheckpointConfig"] == job.request["CheckpointConfig"]


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

def test_results_are_a_csv_with_the_best_first_and_a_run_in_mlflow(empty_db: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    jobs = [Job(i, f"j{i}", (f"train.seed={i}",), {}, 1, usd_hour=2.0) for i in range(3)]
    states = [JobState(COMPLETED, billed_seconds=1800, result={"objective": 0.5}),
              JobState(FAILED, billed_seconds=0, reason="no, it did not"),
              JobState(COMPLETED, billed_seconds=3600, result={"objective": 0.25})]
    shutil.copy(empty_db, tmp_path / "mlflow.db")
    rows = sweep_results.result_rows(jobs, states)
    path = sweep_results.write_table(tmp_path, "mine", rows)
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert [(row["job"], row["objective"], row["billed_usd"], row["train.seed"]) for row in found] == [
        ("j2", "0.25", "2.0", "2"), ("j0", "0.5", "1.0", "0"), ("j1", "", "0.0", "1")]
    plot = sweep_results.write_parallel_coordinates(tmp_path, "mine", sweep_results.parallel_axes(rows))
    assert json.loads(plot.read_text())["axes"] == {"seed": ["2", "0"], "objective": [0.25, 0.5]}
    for some in (rows[:1], rows, rows):  # the sweep is continued, and then repeated
        sweep_results.log_sweep(path, "mine", some, "mlflow", None, "sweeps", tmp_path, plot, local=False)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sweeps")
    [run] = client.search_runs([experiment.experiment_id], "tags.sweep = 'mine'")
    assert run.data.metrics == {"objective": 0.25, "jobs": 3, "failed": 1, "billed_usd": 3.0}
    assert (run.data.tags["best_job"], run.data.params, run.info.status) == ("j2", {}, "FAILED")
    assert [item.step for item in client.get_metric_history(run.info.run_id, "jobs")] == [0, 1]
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


def test_waits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (follower.MAX_PAUSE, s3_bucket.ATTEMPTS) == (120.0, 5)
    assert aws_errors.is_network_error(EndpointConnectionError(endpoint_url="x"))
    for kind in (QuotaExceeded, Unreachable):
        assert not issubclass(kind, UserError)
