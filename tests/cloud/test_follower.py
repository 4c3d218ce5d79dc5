"""Following jobs: an expired login, refusals, quotas, tables, and sweepers that repeat overrides."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError
from botocore.stub import Stubber
from omegaconf import OmegaConf

from dreambooth.cloud import follower, job_preparation, sweep_results
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, Job, JobState, LoginRequired, QuotaExceeded, Unreachable
from dreambooth.cloud.sagemaker_backend import LOGIN_PATIENCE, SageMakerBackend
from dreambooth.errors import ConfigError, Interrupted, UserError
from dreambooth.storage import aws_errors, folders
from dreambooth.sweeps import launched_jobs
from hydra_plugins.dreambooth_sagemaker import _core
from hydra_plugins.dreambooth_sagemaker.launcher import SageMakerLauncherConf
from tests.cloud.memory_backend import HYPER, Cloud, jobs, make_follower, read_table, run_on

pytestmark = pytest.mark.usefixtures("credentials")

# -- an expired login, a refusal ----------------------------------------------------------------------------------

class Failing(Cloud):
    """A backend whose first `times` polls raise an error."""

    def __init__(self, error: Exception, times: int) -> None:
        super().__init__()
        self.error, self.times = error, times

    def poll(self, job: Job) -> JobState:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return super().poll(job)


@pytest.mark.parametrize("error", [LoginRequired("the AWS login has ended: type aws sso login", LOGIN_PATIENCE),
                                   UserError("no permission for sagemaker:DescribeTrainingJob on j0")])
def test_a_sweep_continues_after_an_expired_login_and_a_refusal(
        error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []
    states = make_follower(Failing(error, 6), jobs(2), sleep=waits.append).run()
    assert [state.status for state in states] == [COMPLETED] * 2
    assert capsys.readouterr().out.count(f"{error}; the jobs continue to run, trying again") == 1
    assert waits == [1, 2, 4, 8], "the pauses grow"


@pytest.mark.parametrize("error, hours", [
    (LoginRequired("the AWS login has ended", LOGIN_PATIENCE), 12), (UserError("no permission"), 1),
    (Unreachable("AWS does not answer"), 1), (LoginRequired("the AWS login has ended", 0.0), 0)])
def test_after_a_long_silence_the_command_ends_and_names_the_running_jobs(error: Exception, hours: int) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(UserError) as caught:
        make_follower(Failing(error, 10**6), jobs(2), sleep=sleep, clock=lambda: now[0]).run()
    assert hours * 3600 <= now[0] <= hours * 3600 + 2 * follower.MAX_PAUSE
    message, *commands = str(caught.value).splitlines()[-3:]
    assert str(error) in str(caught.value)
    assert (message, commands) == ("2 jobs still running: AGAIN; to stop them type", ["  stop j0", "  stop j1"])


def test_credentials_refused_from_the_start_start_no_job_and_fail_none() -> None:
    class Refused(Cloud):
        def submit(self, job: Job) -> JobState:
            raise LoginRequired("AWS does not accept these credentials", 0.0)

    follower = make_follower(Refused(), jobs(2))
    with pytest.raises(UserError, match="AWS does not accept these credentials\nno jobs are running: AGAIN"):
        follower.run()
    assert not any(state.ended for state in follower.states)


def test_results_before_a_silence_of_aws_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Cloud):
        def poll(self, job: Job) -> JobState:
            if job.number:
                raise LoginRequired("the AWS login has ended", 0.0)
            return super().poll(job)

    with pytest.raises(UserError, match="2 jobs still running"):
        run_on(Half(), jobs(3), tmp_path, monkeypatch)
    assert read_table(tmp_path) == {"j0": COMPLETED}


def description(job: Job, status: str) -> dict[str, Any]:
    return {"TrainingJobName": job.name, "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/x",
            "ModelArtifacts": {"S3ModelArtifacts": f"s3://bucket/{job.name}/output/model/"}, "CreationTime": 0,
            "TrainingJobStatus": status, "SecondaryStatus": status, "HyperParameters": HYPER,
            "AlgorithmSpecification": {"TrainingInputMode": "File"}, "StoppingCondition": {},
            "ResourceConfig": {"VolumeSizeInGB": 1}}


def test_an_expired_login_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client keeps its credentials: a new client reads those of `aws sso login`."""
    [job] = jobs(1)
    clients = [folders.client("sagemaker") for _ in range(2)]
    old, new = [Stubber(client) for client in clients]
    old.add_response("describe_training_job", description(job, "InProgress"))
    old.add_client_error("describe_training_job", "ExpiredTokenException", "expired", 400)
    new.add_response("describe_training_job", description(job, "InProgress"))
    monkeypatch.setattr(folders, "client", lambda service: clients.pop(0))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with old, new:
        backend = SageMakerBackend()
        backend.poll(job)
        with pytest.raises(LoginRequired, match="type aws sso login in another terminal") as caught:
            backend.poll(job)
        assert caught.value.patience == LOGIN_PATIENCE
        assert backend.poll(job).status == RUNNING


def test_an_expired_login_in_the_environment_is_not_waited_for() -> None:
    [job] = jobs(1)
    client = folders.client("sagemaker")
    with Stubber(client) as stub:
        stub.add_response("describe_training_job", description(job, "InProgress"))
        stub.add_client_error("describe_training_job", "ExpiredTokenException", "expired", 400)
        backend = SageMakerBackend(client)
        backend.poll(job)
        with pytest.raises(LoginRequired, match=r"set AWS_ACCESS_KEY_ID, .* again") as caught:
            backend.poll(job)
    assert caught.value.patience == 0


@pytest.mark.parametrize("code", sorted(aws_errors.EXPIRED))
def test_an_expired_login_is_described_as_expired(code: str) -> None:
    error = type(code, (Exception,), {})()
    assert "the AWS login has expired" in aws_errors.describe_error(error, "s3:GetObject", "here")
    assert aws_errors.needs_login(error)


@pytest.mark.parametrize("code, status, transient, received", [
    ("Unheard", 503, True, True), ("Unheard", 400, False, False), ("ThrottlingException", 400, True, False)])
def test_an_error_of_the_server_is_transient_and_may_come_after_the_work(
        code: str, status: int, transient: bool, received: bool) -> None:
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "CreateTrainingJob")
    assert (aws_errors.is_transient(error), aws_errors.may_have_been_received(error)) == (transient, received)


def test_a_result_that_cannot_be_fetched_now_is_fetched_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is paid for: it fails only if its result does not exist."""
    answers: list[Any] = [ConnectTimeoutError(endpoint_url="x"), {"objective": 0.5}]

    def read(uri: str) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise UserError("AWS did not answer") from answer
        return answer

    monkeypatch.setattr(folders, "read_json", read)
    client = folders.client("sagemaker")
    [job] = jobs(1)
    with Stubber(client) as stub:
        for _ in range(2):
            stub.add_response("describe_training_job", description(job, "Completed"))
        backend = SageMakerBackend(client)
        with pytest.raises(Unreachable):
            backend.poll(job)
        assert sweep_results.objective(backend.poll(job)) == 0.5


@pytest.mark.parametrize("code, is_lost", [("AccessDenied", False), ("KMS.DisabledException", False),
                                           ("NoSuchKey", True), ("404", True)])
def test_a_result_that_may_not_be_read_is_not_lost(
        code: str, is_lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permission may be added; a repeated command then reads the result of the paid job."""
    def read(uri: str) -> Any:
        raise UserError("refused") from ClientError({"Error": {"Code": code}}, "GetObject")

    monkeypatch.setattr(folders, "read_json", read)
    client = folders.client("sagemaker")
    [job] = jobs(1)
    with Stubber(client) as stub:
        stub.add_response("describe_training_job", description(job, "Completed"))
        state = sweep_results.fail_without_objective(SageMakerBackend(client).poll(job))
    assert "cannot be read" in state.reason
    monkeypatch.setattr(launched_jobs.study_jobs, "stopped", stopped := {})
    monkeypatch.setattr(_core, "job_failures", [])
    config = OmegaConf.create({"hydra": {"job": {"name": "train"}, "sweep": {"dir": "."}}})
    _core._job_return(config, job, state)
    assert list(stopped) == ([] if is_lost else [job.number])  # a study runs those again, which polls the same job


# -- quotas, tables, numbers --------------------------------------------------------------------------------------

def test_a_used_up_quota_does_not_delay_other_instance_types() -> None:
    class NoG5(Cloud):
        most = 0

        def submit(self, job: Job) -> JobState:
            if job.instance_type == "ml.g5.xlarge":
                raise QuotaExceeded("no quota for ml.g5.xlarge")
            return super().submit(job)

        def poll(self, job: Job) -> JobState:
            self.most = max(self.most, sum(left > 0 for left in self.left.values()))
            return super().poll(job)

    cloud = NoG5()
    states = make_follower(cloud, jobs(6, lambda number: f"ml.{'g4dn' if number % 2 else 'g5'}.xlarge")).run()
    assert [state.status for state in states] == [FAILED, COMPLETED] * 3
    assert cloud.most == 3


def test_overrides_are_not_rendered_as_markup() -> None:
    from rich.console import Console

    job = Job(0, "j0", ("sample.prompts=[a photo of a dog]", "x=[/]"), {}, 1)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(make_follower(Cloud(), [job])._table())
    assert "sample.prompts=[a photo of a dog] x=[/]" in capture.get()


def test_jobs_are_distinguishable_in_80_columns() -> None:
    from rich.console import Console

    long_named = [Job(i, f"train-20261128-151200-{i}-1a2b3c4d", (f"train.learning_rate={i}e-6",), {}, 1)
                  for i in (1, 2)]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(make_follower(Cloud(), long_named)._table())
    text = capture.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert all(f"={i}e-6" in text for i in (1, 2))


@pytest.mark.parametrize("key, value", [
    ("poll_seconds", -1), ("poll_seconds", 0), ("poll_seconds", float("nan")), ("max_run_hours", float("inf")),
    ("max_run_hours", -1), ("max_wait_hours", float("inf")), ("instance_count", 0)])
def test_a_number_out_of_range_is_refused_before_anything_is_submitted(key: str, value: float) -> None:
    good = vars(SageMakerLauncherConf())
    job_preparation.check_numbers([good])
    with pytest.raises(ConfigError, match=rf"hydra.launcher.{key} must be from \S+ to \d+, not {value}"):
        job_preparation.check_numbers([good, good | {key: value}])


OPTUNA = {"sweeper": {"_target_": "hydra_plugins.dreambooth_optuna.sweeper.OptunaSweeper"}}


def test_with_optuna_the_same_command_follows_jobs_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class InterruptedPoll(Cloud):
        def poll(self, job: Job) -> JobState:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command follows these jobs again; to stop them type"):
        run_on(InterruptedPoll(), jobs(1), tmp_path, monkeypatch, **OPTUNA)
    assert "hydra.launcher.sweep=" not in capsys.readouterr().out


def test_overrides_that_a_sweeper_repeats_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna repeats points within a batch, and in a later one."""
    monkeypatch.setattr(_core, "_report", lambda *args: None)
    cloud = Cloud()
    same = [replace(job, number=number, name=f"n{number}", usd_hour=1.0) for number, job in enumerate(jobs(1) * 3)]
    returns = run_on(cloud, [same[0], same[1], *jobs(3)[2:]], tmp_path, monkeypatch, **OPTUNA)
    assert (list(cloud.left), [item.return_value for item in returns]) == (["n0", "j2"], [0.5] * 3)
    done: sweep_results.Results = {}
    state = JobState(COMPLETED, billed_seconds=3600, result={"objective": 0.5})
    assert sweep_results.jobs_to_run(same[:2], done) == same[:1]
    sweep_results.share_results(same[:2], same[:1], [state], done)
    assert sweep_results.jobs_to_run(same[2:], done) == []
    table = sweep_results.result_rows(*sweep_results.share_results(same[2:], [], [], done))
    assert [(row["number"], row["job"], row["billed_usd"], row["objective"]) for row in table] == [(2, "n0", 0.0, 0.5)]


def test_a_job_that_fails_under_optuna_ends_the_command_with_its_message(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna continues after a failed job, so the launcher's error does not reach the command."""
    monkeypatch.setattr(_core, "job_failures", failures := [])
    monkeypatch.setattr(_core, "_report", lambda *args: None)

    class Diverging(Cloud):
        def poll(self, job: Job) -> JobState:
            return JobState(FAILED, reason="it diverged") if job.name == "j1" else super().poll(job)

    run_on(Diverging(), jobs(3), tmp_path, monkeypatch, **OPTUNA)
    assert [str(failure) for failure in failures] == ["dreambooth: job j1 failed: it diverged"]


def test_overrides_that_failed_are_run_again() -> None:
    done: sweep_results.Results = {}
    sweep_results.share_results(jobs(1), jobs(1), [JobState(FAILED)], done)
    assert sweep_results.jobs_to_run(jobs(1), done) == jobs(1)
