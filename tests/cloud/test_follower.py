"""Jobs of a sweep when something comes between: Ctrl-C at any moment, a login that ends, a quota that is full."""

import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ConnectTimeoutError
from botocore.stub import Stubber
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from dreambooth.cloud import follower, sweep_results
from dreambooth.cloud.follower import Follower
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, Busy, Job, LoggedOut, Seen, Unreachable
from dreambooth.cloud.sagemaker_backend import NIGHT, TrainingJobs
from dreambooth.errors import ConfigError, Interrupted, UserError
from dreambooth.storage import aws_errors, folders
from hydra_plugins.dreambooth_sagemaker import _core, _prepare
from hydra_plugins.dreambooth_sagemaker.launcher import SageMakerLauncher, SageMakerLauncherConf
from tests.support.s3_server import KEYS

HYPER = {"train.seed": "1"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)


def jobs(count: int, machine: Callable[[int], str] = lambda number: "ml.g4dn.xlarge") -> list[Job]:
    return [Job(i, f"j{i}", (f"train.seed={i}",), {
        "TrainingJobName": f"j{i}", "HyperParameters": HYPER, "ResourceConfig": {"InstanceType": machine(i)}}, 1)
        for i in range(count)]


class Cloud:
    """A Backend. `looks`: how often each job is looked at before it is done."""

    def __init__(self, looks: int = 1) -> None:
        self.looks, self.left, self.stopped = looks, dict[str, int](), list[str]()

    def submit(self, job: Job) -> Seen:
        self.left.setdefault(job.name, self.looks)
        return Seen(RUNNING, "Training")

    def look(self, job: Job) -> Seen:
        self.left[job.name] -= 1
        return Seen(RUNNING) if self.left[job.name] > 0 else Seen(COMPLETED, result={"objective": 0.5})

    def stop(self, job: Job) -> bool:
        self.stopped.append(job.name)
        return job.name in self.left

    def stop_hint(self, job: Job) -> str:
        return f"stop {job.name}"


def following(backend: Any, asked: list[Job], **options: Any) -> Follower:
    turns = iter(range(100))  # a loop that never ends is a failure, too
    return Follower(backend, asked, **({"max_parallel": 4, "poll_seconds": 1, "stop_on_interrupt": False,
                                        "again": "AGAIN", "sleep": lambda seconds: next(turns)} | options))


# -- Ctrl-C -------------------------------------------------------------------------------------------------------

class Pressed(Cloud):
    """Ctrl-C while the last of four is being submitted. `arrived`: the service has got it."""

    def __init__(self, arrived: bool) -> None:
        super().__init__(looks=9)
        self.arrived = arrived

    def submit(self, job: Job) -> Seen:
        if job.number < 3:
            return super().submit(job)
        if self.arrived:
            super().submit(job)
        raise KeyboardInterrupt


def test_ctrl_c_while_a_job_is_submitted_stops_that_one_too() -> None:
    cloud = Pressed(arrived=True)
    with pytest.raises(Interrupted) as caught:
        following(cloud, jobs(5), stop_on_interrupt=True).run()
    assert (str(caught.value), cloud.stopped) == ("4 jobs were told to save and stop", ["j0", "j1", "j2", "j3"])


def test_ctrl_c_while_a_job_is_submitted_says_how_to_stop_what_nobody_knows_of() -> None:
    with pytest.raises(Interrupted) as caught:
        following(Pressed(arrived=False), jobs(5), stop_on_interrupt=True).run()
    assert str(caught.value).splitlines() == [
        "3 jobs were told to save and stop, these may run on; type", "  stop j3  # it may have begun"]
    with pytest.raises(Interrupted) as caught:
        following(Pressed(arrived=False), jobs(5)).run()
    assert str(caught.value).splitlines() == [
        "4 jobs run on: AGAIN; to stop them type", "  stop j0", "  stop j1", "  stop j2",
        "  stop j3  # it may have begun"]


def test_ctrl_c_before_a_lost_submission_is_tried_again_counts_it() -> None:
    class Silent(Cloud):
        def submit(self, job: Job) -> Seen:
            raise Unreachable("AWS does not answer (ReadTimeoutError)")

    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="1 jobs run on: AGAIN; to stop them type\n  stop j0  # it may have begun"):
        following(Silent(), jobs(2), sleep=pressed).run()


def test_a_lost_submission_is_tried_again_and_takes_the_place_of_one() -> None:
    class Lost(Cloud):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def submit(self, job: Job) -> Seen:
            self.calls.append(job.name)
            if len(self.calls) == 1:
                raise Unreachable("AWS does not answer (ReadTimeoutError)")
            return super().submit(job)

    cloud = Lost()
    assert [end.status for end in following(cloud, jobs(2), max_parallel=1).run()] == [COMPLETED] * 2
    assert cloud.calls == ["j0", "j0", "j1"]


def test_a_second_ctrl_c_lists_what_was_not_stopped() -> None:
    class Slow(Cloud):
        def stop(self, job: Job) -> bool:
            if job.number == 1:
                raise KeyboardInterrupt
            return super().stop(job)

    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        following(Slow(9), jobs(3), stop_on_interrupt=True, sleep=pressed).run()
    assert str(caught.value).splitlines() == [
        "1 jobs were told to save and stop, these may run on; type", "  stop j1", "  stop j2"]


def test_a_fault_of_ours_says_which_jobs_run_on() -> None:
    class Broken(Cloud):
        def look(self, job: Job) -> Seen:
            raise KeyError("status")

    with pytest.raises(KeyError) as caught:
        following(Broken(), jobs(1)).run()
    assert caught.value.__notes__ == ["1 jobs run on: AGAIN; to stop them type\n  stop j0"]


def launched(folder: Path, monkeypatch: pytest.MonkeyPatch, cloud: Any, asked: list[Job], **hydra: Any) -> list[Any]:
    """_core's way to the cloud, with another cloud."""
    monkeypatch.setattr(_core, "TrainingJobs", lambda: cloud)
    monkeypatch.setattr(_prepare, "prepared", lambda *words: asked)
    monkeypatch.setattr(_prepare, "announced", lambda jobs, mode: ["announced"])
    monkeypatch.setattr(_prepare, "task", lambda config: config)
    launcher = SageMakerLauncher(**vars(SageMakerLauncherConf()) | {"poll_seconds": 0, "sweep": "mine"})
    config = OmegaConf.create({
        "run_root": str(folder), "tracking": {"kind": "none", "uri": None, "experiment": "x"},
        "hydra": {"sweep": {"dir": str(folder)}, "job": {"name": "train"}, "sweeper": {},
                  "launcher": {"mlflow_uri": None}} | hydra})
    launcher.config = config
    return _core._away(launcher, [config] * len(asked), 0)


def rows(folder: Path) -> dict[str, str]:
    with (folder / "results-mine.csv").open() as file:
        return {row["job"]: row["status"] for row in csv.DictReader(file)}


def test_ctrl_c_keeps_what_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Cloud):
        def look(self, job: Job) -> Seen:
            if job.number:
                raise KeyboardInterrupt
            return super().look(job)

    with pytest.raises(Interrupted, match=r"2 jobs run on: the same command with hydra.launcher.sweep=mine follows"):
        launched(tmp_path, monkeypatch, Half(), jobs(3))
    assert rows(tmp_path) == {"j0": COMPLETED}


def test_ctrl_c_does_not_replace_a_table_in_which_more_have_ended(tmp_path: Path) -> None:
    ends = [Seen(COMPLETED, result={"objective": 0.5})] * 3
    sweep_results.write(tmp_path, "mine", sweep_results.rows(jobs(3), ends))
    assert sweep_results.write_some(tmp_path, "mine", sweep_results.rows(jobs(2), ends[:2])) is None
    assert len(rows(tmp_path)) == 3
    assert sweep_results.write_some(tmp_path, "other", []) is None


def test_ctrl_c_while_results_are_written_says_how_to_get_them(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*words: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "_report", pressed)
    with pytest.raises(Interrupted, match=r"all jobs have ended: the same command with hydra.launcher.sweep=mine"):
        launched(tmp_path, monkeypatch, Cloud(), jobs(1))


def test_ctrl_c_while_jobs_are_checked_is_a_sentence_and_5(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def pressed(*words: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "_composed", pressed)
    monkeypatch.setattr(_core, "configure_log", lambda *words: None)
    launcher: Any = SageMakerLauncher(**vars(SageMakerLauncherConf()))
    launcher.hydra_context = object()
    launcher.config = OmegaConf.create({"hydra": {
        "hydra_logging": {}, "verbose": False, "sweep": {"dir": str(tmp_path)}, "job": {"name": "train"}}})
    with pytest.raises(SystemExit) as caught:
        _core.launch(launcher, [["a=1"]], 0)
    assert caught.value.code == 5
    assert capsys.readouterr().err == "dreambooth: interrupted before anything was submitted: repeat the command\n"


def test_ctrl_c_in_this_process_keeps_what_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The door of a run that was interrupted ends the process."""
    ran: list[Any] = []

    def run_job(**words: Any) -> JobReturn:
        if ran:
            sys.exit(5)
        ran.append(words)
        done = JobReturn(status=JobStatus.COMPLETED)
        done.return_value = 0.5
        return done

    monkeypatch.setattr(_core, "run_job", run_job)
    monkeypatch.setattr(_core, "configure_log", lambda *words: None)
    launcher: Any = SageMakerLauncher(**vars(SageMakerLauncherConf()) | {"mode": "local", "sweep": "mine"})
    launcher.hydra_context, launcher.task_function = object(), print
    launcher.config = OmegaConf.create({"tracking": {}, "hydra": {
        "hydra_logging": {}, "verbose": False, "sweep": {"dir": str(tmp_path)}}})
    with pytest.raises(SystemExit):
        _core._here(launcher, [launcher.config] * 3, [[f"train.seed={i}"] for i in range(3)], 0)
    assert rows(tmp_path) == {"#0": COMPLETED}


# -- a login that ends, a refusal ---------------------------------------------------------------------------------

class Ending(Cloud):
    """Nothing may be seen for some looks."""

    def __init__(self, error: Exception, times: int) -> None:
        super().__init__()
        self.error, self.times = error, times

    def look(self, job: Job) -> Seen:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return super().look(job)


@pytest.mark.parametrize("error", [LoggedOut("the AWS login has ended: type aws sso login", NIGHT),
                                   UserError("no permission for sagemaker:DescribeTrainingJob on j0")])
def test_a_sweep_outlives_its_login_and_a_refusal(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []
    ends = following(Ending(error, 6), jobs(2), sleep=waits.append).run()
    assert [end.status for end in ends] == [COMPLETED] * 2
    assert capsys.readouterr().out.count(f"{error}; the jobs run on, asking again") == 1
    assert waits == [1, 2, 4, 8], "it is asked more slowly"


@pytest.mark.parametrize("error, hours", [
    (LoggedOut("the AWS login has ended", NIGHT), 12), (UserError("no permission"), 1),
    (Unreachable("AWS does not answer"), 1), (LoggedOut("the AWS login has ended", 0.0), 0)])
def test_who_waits_in_vain_is_told_what_runs_on(error: Exception, hours: int) -> None:
    now = [0.0]

    def slept(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(UserError) as caught:
        following(Ending(error, 10**6), jobs(2), sleep=slept, clock=lambda: now[0]).run()
    assert hours * 3600 <= now[0] <= hours * 3600 + 2 * follower.SLOWEST
    words, *hints = str(caught.value).splitlines()[-3:]
    assert str(error) in str(caught.value)
    assert (words, hints) == ("2 jobs run on: AGAIN; to stop them type", ["  stop j0", "  stop j1"])


def test_a_login_that_is_refused_from_the_first_begins_and_fails_nothing() -> None:
    class Refused(Cloud):
        def submit(self, job: Job) -> Seen:
            raise LoggedOut("AWS does not accept these credentials", 0.0)

    watching = following(Refused(), jobs(2))
    with pytest.raises(UserError, match="AWS does not accept these credentials\nno job runs: AGAIN"):
        watching.run()
    assert not any(seen.ended for seen in watching.seen)


def test_what_ended_before_aws_fell_silent_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Cloud):
        def look(self, job: Job) -> Seen:
            if job.number:
                raise LoggedOut("the AWS login has ended", 0.0)
            return super().look(job)

    with pytest.raises(UserError, match="2 jobs run on"):
        launched(tmp_path, monkeypatch, Half(), jobs(3))
    assert rows(tmp_path) == {"j0": COMPLETED}


def told(job: Job, status: str) -> dict[str, Any]:
    return {"TrainingJobName": job.name, "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/x",
            "ModelArtifacts": {"S3ModelArtifacts": f"s3://bucket/{job.name}/output/model/"}, "CreationTime": 0,
            "TrainingJobStatus": status, "SecondaryStatus": status, "HyperParameters": HYPER,
            "AlgorithmSpecification": {"TrainingInputMode": "File"}, "StoppingCondition": {},
            "ResourceConfig": {"VolumeSizeInGB": 1}}


def test_an_ended_login_is_looked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client keeps its credentials: the next one reads those of `aws sso login`."""
    [job] = jobs(1)
    clients = [folders.client("sagemaker") for _ in range(2)]
    old, new = [Stubber(client) for client in clients]
    old.add_response("describe_training_job", told(job, "InProgress"))
    old.add_client_error("describe_training_job", "ExpiredTokenException", "expired", 400)
    new.add_response("describe_training_job", told(job, "InProgress"))
    monkeypatch.setattr(folders, "client", lambda service: clients.pop(0))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with old, new:
        backend = TrainingJobs()
        backend.look(job)
        with pytest.raises(LoggedOut, match="type aws sso login in another terminal") as caught:
            backend.look(job)
        assert caught.value.patience == NIGHT
        assert backend.look(job).status == RUNNING


def test_a_login_in_the_environment_is_not_waited_for() -> None:
    [job] = jobs(1)
    client = folders.client("sagemaker")
    with Stubber(client) as stub:
        stub.add_response("describe_training_job", told(job, "InProgress"))
        stub.add_client_error("describe_training_job", "ExpiredTokenException", "expired", 400)
        backend = TrainingJobs(client)
        backend.look(job)
        with pytest.raises(LoggedOut, match=r"set AWS_ACCESS_KEY_ID, .* anew") as caught:
            backend.look(job)
    assert caught.value.patience == 0


@pytest.mark.parametrize("code", sorted(aws_errors.EXPIRED))
def test_a_login_that_has_ended_is_not_one_that_was_never_there(code: str) -> None:
    error = type(code, (Exception,), {})()
    assert "the AWS login has ended" in aws_errors.sentence(error, "s3:GetObject", "here")
    assert aws_errors.logged_out(error)


def test_a_result_that_cannot_be_fetched_now_is_fetched_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is paid for: only a result that is not there makes it fail."""
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
            stub.add_response("describe_training_job", told(job, "Completed"))
        backend = TrainingJobs(client)
        with pytest.raises(Unreachable):
            backend.look(job)
        assert sweep_results.objective(backend.look(job)) == 0.5


# -- quotas, tables, numbers --------------------------------------------------------------------------------------

def test_a_full_quota_of_one_type_holds_up_no_other() -> None:
    class NoG5(Cloud):
        most = 0

        def submit(self, job: Job) -> Seen:
            if job.machine == "ml.g5.xlarge":
                raise Busy("no quota for ml.g5.xlarge")
            return super().submit(job)

        def look(self, job: Job) -> Seen:
            self.most = max(self.most, sum(left > 0 for left in self.left.values()))
            return super().look(job)

    cloud = NoG5()
    ends = following(cloud, jobs(6, lambda number: f"ml.{'g4dn' if number % 2 else 'g5'}.xlarge")).run()
    assert [end.status for end in ends] == [FAILED, COMPLETED] * 3
    assert cloud.most == 3


def test_what_was_typed_is_no_markup() -> None:
    from rich.console import Console

    job = Job(0, "j0", ("sample.prompts=[a photo of a dog]", "x=[/]"), {}, 1)
    console = Console(width=200)
    with console.capture() as seen:
        console.print(following(Cloud(), [job])._table())
    assert "sample.prompts=[a photo of a dog] x=[/]" in seen.get()


def test_jobs_are_told_apart_in_80_columns() -> None:
    from rich.console import Console

    asked = [Job(i, f"train-20261128-151200-{i}-1a2b3c4d", (f"train.learning_rate={i}e-6",), {}, 1) for i in (1, 2)]
    console = Console(width=80)
    with console.capture() as seen:
        console.print(following(Cloud(), asked)._table())
    text = seen.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert all(f"={i}e-6" in text for i in (1, 2))


@pytest.mark.parametrize("key, value", [
    ("poll_seconds", -1), ("poll_seconds", 0), ("poll_seconds", float("nan")), ("max_run_hours", float("inf")),
    ("max_run_hours", -1), ("max_wait_hours", float("inf")), ("instance_count", 0)])
def test_a_number_that_cannot_be_is_refused_before_anything_is_submitted(key: str, value: float) -> None:
    good = OmegaConf.create({"hydra": {"launcher": vars(SageMakerLauncherConf())}})
    _core._check_numbers([good])
    bad = OmegaConf.merge(good, {"hydra": {"launcher": {key: value}}})
    with pytest.raises(ConfigError, match=rf"hydra.launcher.{key} must be from \S+ to \d+, not {value}"):
        _core._check_numbers([good, bad])  # type: ignore[list-item]


OPTUNA = {"sweeper": {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper", "storage": None}}


def test_with_optuna_nobody_is_told_to_follow_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Pressed(Cloud):
        def look(self, job: Job) -> Seen:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="no command follows these jobs again; to stop them type"):
        launched(tmp_path, monkeypatch, Pressed(), jobs(1), **OPTUNA)
    assert "hydra.launcher.sweep=" not in capsys.readouterr().out


def test_a_point_that_a_sweeper_repeats_is_paid_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna does that: within a batch, and after another one."""
    monkeypatch.setattr(_core, "_report", lambda *words: None)
    cloud = Cloud()
    same = [replace(job, number=number, name=f"n{number}", usd_hour=1.0) for number, job in enumerate(jobs(1) * 3)]
    first = launched(tmp_path, monkeypatch, cloud, [same[0], same[1], *jobs(3)[2:]], **OPTUNA)
    assert (list(cloud.left), [one.return_value for one in first]) == (["n0", "j2"], [0.5] * 3)
    done: sweep_results.Points = {}
    end = Seen(COMPLETED, billed=3600, result={"objective": 0.5})
    assert sweep_results.unlike(same[:2], done) == same[:1]
    sweep_results.shared(same[:2], same[:1], [end], done)
    assert sweep_results.unlike(same[2:], done) == []
    table = sweep_results.rows(*sweep_results.shared(same[2:], [], [], done))
    assert [(row["number"], row["job"], row["billed_usd"], row["objective"]) for row in table] == [(2, "n0", 0.0, 0.5)]


def test_a_point_that_failed_is_tried_again() -> None:
    done: sweep_results.Points = {}
    sweep_results.shared(jobs(1), jobs(1), [Seen(FAILED)], done)
    assert sweep_results.unlike(jobs(1), done) == jobs(1)
