"""Jobs of a study of Optuna: a bad one is stopped, one that somebody has stopped is taken up again, costs are kept."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from dreambooth.cloud import training_job_request
from dreambooth.cloud.job import COMPLETED, RUNNING, STOPPED, Job, JobState
from dreambooth.cloud.job_preparation import prepare_jobs
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.cloud.training_job_request import JobSettings, build_request
from dreambooth.errors import Interrupted, UserError
from dreambooth.runs import pruning
from dreambooth.sweeps.launched_jobs import spent, study_jobs
from dreambooth.sweeps.studies import PRUNED
from hydra_plugins.dreambooth_optuna._core import Recorder
from hydra_plugins.dreambooth_sagemaker import _prepare
from tests.cloud.jobs import PHOTOS, config_of
from tests.cloud.memory_backend import Cloud, jobs, read_table, run_on
from tests.sweeps.test_optuna_sweeper import run_sweep

FINAL = {"j0": 0.1, "j1": 0.9, "j2": 0.05}  # of each job; a value at each of three steps before is a little higher


class Curves(Cloud):
    """A backend whose jobs report three values and then end."""

    def __init__(self) -> None:
        super().__init__(polls=4)
        self.ended: list[str] = []

    def poll(self, job: Job) -> JobState:
        self.left[job.name] -= 1
        step, value = 4 - self.left[job.name], FINAL[job.name]
        if job.name in self.stopped:
            return JobState(STOPPED, "Stopped", billed_seconds=60, reason="it was stopped")
        if self.left[job.name] > 0:
            return JobState(RUNNING, reported=(10 * step, value + 0.01 * self.left[job.name]))
        self.ended.append(job.name)
        return JobState(COMPLETED, result={"objective": value}, billed_seconds=100)


@pytest.fixture(autouse=True)
def clean_study_jobs() -> Any:
    yield
    study_jobs.search, study_jobs.costs, study_jobs.earlier_runs = None, {}, []
    study_jobs.stopped.clear()
    study_jobs.pruned.clear()


def test_a_bad_job_is_stopped_and_the_next_one_takes_its_place(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    recorder = Recorder(study, None, {number: study.ask() for number in range(3)})
    told: list[int] = []

    def end_first(self: Any, job: Job) -> JobState:  # Optuna compares with trials that were told
        state = Curves.poll(self, job)
        if state.status == COMPLETED and job.number == 0:
            study.tell(recorder.trials[0], FINAL["j0"])
            told.append(0)
        return state

    study_jobs.search = recorder
    cloud = type("Cloud", (Curves,), {"poll": end_first})()
    returns = run_on(cloud, jobs(3), tmp_path, monkeypatch, max_parallel=1)
    assert cloud.stopped == ["j1"] and cloud.ended == ["j0", "j2"] and told == [0]
    recorder.states[0] = "COMPLETE"
    for number, job_return in enumerate(returns):
        recorder.tell(number, job_return)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert list(study.trials[1].intermediate_values) == [10]
    assert read_table(tmp_path) == {"j0": "Completed", "j1": "Pruned", "j2": "Completed"}
    assert recorder.is_pruned(1)  # kept in the study: a command that is killed now does not take the job for a failure


def test_a_second_trial_with_the_settings_of_a_pruned_one_is_pruned_too(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.5))
    recorder = Recorder(study, None, {number: study.ask() for number in range(3)})
    study_jobs.search = recorder
    same = jobs(3)
    same[2] = replace(same[2], overrides=same[1].overrides)  # only the first of them is run
    cloud = Curves()
    for number, job_return in enumerate(run_on(cloud, same, tmp_path, monkeypatch)):
        recorder.tell(number, job_return)
    assert cloud.stopped == ["j1"] and "j2" not in cloud.left
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]


def test_the_job_of_a_pruned_trial_is_never_submitted_again(
        environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command was killed after the trial was pruned, and is repeated with resubmit=true."""
    first: list[str] = []

    class Stopped(SageMakerBackend):
        def has_failed(self, name: str) -> bool:
            return name in first

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    composed = _prepare.read_jobs([config_of("hardware=g4dn", "hydra.launcher.resubmit=true", *PHOTOS, number=number)
                                   for number in range(2)])
    study = optuna.create_study()
    recorder = Recorder(study, None, {number: study.ask() for number in range(2)})
    recorder.trials[0].set_user_attr(PRUNED, True)
    first += [job.name for job in prepare_jobs(composed, "mine", Stopped(), "aws")]
    again = [job.name for job in prepare_jobs(composed, "mine", Stopped(), "aws", None, recorder)]
    assert again[0] == first[0] and again[1] != first[1]


def test_a_stop_that_is_refused_delays_no_other_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Curves):
        def stop(self, job: Job) -> bool:
            raise UserError("the role must be allowed to stop jobs")

    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.5))
    study_jobs.search = Recorder(study, None, {number: study.ask() for number in range(3)})
    cloud = Refusing()
    run_on(cloud, jobs(3), tmp_path, monkeypatch, max_parallel=1)
    assert cloud.ended == ["j0", "j1", "j2"]


class Jobs:
    """A launcher in whose first batch somebody stops job 1."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, tuple[str, ...]]] = []
        self.environment: dict[str, str] = {}
        self.stop = True

    def setup(self, config: Any, hydra_context: Any, task_function: Any) -> "Jobs":
        job = hydra_context.config_loader.load_sweep_config(config, [])
        self.environment = dict(OmegaConf.select(job, "hydra.launcher.environment") or {})
        return self

    def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        returns = []
        for number, words in enumerate(overrides, initial_job_idx):
            self.launched.append((number, tuple(words)))
            study_jobs.costs[f"job-{number}-{len(self.launched)}"] = (0.5, 0.25)
            result = JobReturn(hydra_cfg=OmegaConf.create(), status=JobStatus.COMPLETED)
            result.return_value = float(number)
            if number == 1 and self.stop:
                result.status, study_jobs.stopped[1] = JobStatus.FAILED, "job j1: it was stopped"
            returns.append(result)
        return returns


def test_a_job_that_somebody_stopped_waits_for_the_next_command(
        hydra_restore_singletons: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Jobs()
    monkeypatch.setattr(Plugins.instance(), "instantiate_launcher", launcher.setup)
    words = ["+x=choice(1,2,3,4)", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=4"]
    with pytest.raises(Interrupted, match=r"1 trial of the study \S+ stopped before the end \(job j1: it was"):
        run_sweep(lambda cfg: 0.0, tmp_path, *words)
    assert [number for number, _ in launcher.launched] == [0, 1, 2, 3]  # the other trials went on
    launcher.stop = False
    run_sweep(lambda cfg: 0.0, tmp_path, *words)
    assert not launcher.environment
    assert launcher.launched[4:] == [launcher.launched[1]]
    assert len(study_jobs.costs) == 5 and spent({"job-1-5"}) == (2.0, 1.0)  # four jobs of the first command


def test_the_jobs_of_a_search_with_a_pruner_learn_what_to_report(
        hydra_restore_singletons: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Jobs()
    launcher.stop = False
    monkeypatch.setattr(Plugins.instance(), "instantiate_launcher", launcher.setup)
    run_sweep(lambda cfg: 0.0, tmp_path, "+x=choice(1,2)", "hydra/launcher=sagemaker_schema",
              "hydra.sweeper.n_trials=2", "hydra/sweeper/pruner=median", "hydra.sweeper.prune_measure=dino+0.5*pres")
    assert launcher.environment == {pruning.VARIABLE: "dino+0.5*pres"}


def test_a_job_of_a_search_reports_its_values_and_the_backend_reads_them(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert pruning.get_reporter() is None
    monkeypatch.setenv(pruning.VARIABLE, "dino")
    reporter = pruning.get_reporter()
    assert reporter is not None and reporter.measure == "dino" and not reporter.report(40, 0.1234)
    settings = {"image": "i", "role": "r", "s3": "s3://b/p", "instance_type": "ml.g4dn.xlarge"}
    found: dict[str, str] = {}
    for environment in ({}, {pruning.VARIABLE: "dino"}):
        request = build_request(JobSettings(**settings, environment=environment), "n", "s", {}, {}, None, None)
        found = {item["Name"]: item["Regex"] for item in request["AlgorithmSpecification"]["MetricDefinitions"]}
        assert ("reported_step" in found) is bool(environment)
    line = capsys.readouterr().out
    matches = [training_job_request.re.search(found[name], line) for name in ("reported_step", "reported_value")]
    assert [match and match[1] for match in matches] == ["40", "0.1234"]
