"""Ctrl-C while jobs are submitted, followed or written into a table."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from dreambooth.cloud import sweep_results
from dreambooth.cloud.job import COMPLETED, Job, JobState, Unreachable
from dreambooth.errors import Interrupted
from hydra_plugins.dreambooth_sagemaker import _core
from tests.cloud.memory_backend import Cloud, jobs, make_follower, read_table, run_on, sweep_state

pytestmark = pytest.mark.usefixtures("credentials")

# -- Ctrl-C -------------------------------------------------------------------------------------------------------

class InterruptedSubmit(Cloud):
    """Ctrl-C while the fourth job is being submitted. `arrived`: the service has received the request."""

    def __init__(self, arrived: bool) -> None:
        super().__init__(polls=9)
        self.arrived = arrived

    def submit(self, job: Job) -> JobState:
        if job.number < 3:
            return super().submit(job)
        if self.arrived:
            super().submit(job)
        raise KeyboardInterrupt


def test_ctrl_c_while_a_job_is_submitted_stops_that_one_too() -> None:
    cloud = InterruptedSubmit(arrived=True)
    with pytest.raises(Interrupted) as caught:
        make_follower(cloud, jobs(5), stop_on_interrupt=True).run()
    assert (str(caught.value), cloud.stopped) == ("4 jobs asked to save and stop", ["j0", "j1", "j2", "j3"])


def test_ctrl_c_while_a_job_is_submitted_says_how_to_stop_a_job_that_may_run() -> None:
    with pytest.raises(Interrupted) as caught:
        make_follower(InterruptedSubmit(arrived=False), jobs(5), stop_on_interrupt=True).run()
    assert str(caught.value).splitlines() == [
        "3 jobs asked to save and stop; these may still be running, to stop them type",
        "  stop j3  # it may have started"]
    with pytest.raises(Interrupted) as caught:
        make_follower(InterruptedSubmit(arrived=False), jobs(5)).run()
    assert str(caught.value).splitlines() == [
        "4 jobs still running: AGAIN; to stop them type", "  stop j0", "  stop j1", "  stop j2",
        "  stop j3  # it may have started"]


def test_ctrl_c_after_an_unanswered_submission_counts_that_job() -> None:
    class Silent(Cloud):
        def submit(self, job: Job) -> JobState:
            raise Unreachable("AWS does not answer (ReadTimeoutError)")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    message = "1 job still running: AGAIN; to stop them type\n  stop j0  # it may have started"
    with pytest.raises(Interrupted, match=message):
        make_follower(Silent(), jobs(2), sleep=interrupt).run()


def test_an_unanswered_submission_is_repeated_and_counts_as_running() -> None:
    class Lost(Cloud):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def submit(self, job: Job) -> JobState:
            self.calls.append(job.name)
            if len(self.calls) == 1:
                raise Unreachable("AWS does not answer (ReadTimeoutError)")
            return super().submit(job)

    cloud = Lost()
    assert [state.status for state in make_follower(cloud, jobs(2), max_parallel=1).run()] == [COMPLETED] * 2
    assert cloud.calls == ["j0", "j0", "j1"]


def test_a_second_ctrl_c_lists_the_jobs_that_were_not_stopped() -> None:
    class Slow(Cloud):
        def stop(self, job: Job) -> bool:
            if job.number == 1:
                raise KeyboardInterrupt
            return super().stop(job)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        make_follower(Slow(9), jobs(3), stop_on_interrupt=True, sleep=interrupt).run()
    assert str(caught.value).splitlines() == [
        "1 job asked to save and stop; these may still be running, to stop them type", "  stop j1", "  stop j2"]


def test_an_unexpected_error_says_which_jobs_are_still_running() -> None:
    class Broken(Cloud):
        def poll(self, job: Job) -> JobState:
            raise KeyError("status")

    with pytest.raises(KeyError) as caught:
        make_follower(Broken(), jobs(1)).run()
    assert caught.value.__notes__ == ["1 job still running: AGAIN; to stop them type\n  stop j0"]


def test_ctrl_c_writes_the_results_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Cloud):
        def poll(self, job: Job) -> JobState:
            if job.number:
                raise KeyboardInterrupt
            return super().poll(job)

    with pytest.raises(Interrupted, match=r"2 jobs still running: the same command with hydra.launcher.sweep=mine"):
        run_on(Half(), jobs(3), tmp_path, monkeypatch)
    assert read_table(tmp_path) == {"j0": COMPLETED}


def test_ctrl_c_does_not_replace_a_table_with_more_results(tmp_path: Path) -> None:
    states = [JobState(COMPLETED, result={"objective": 0.5})] * 3
    sweep_results.write_table(tmp_path, "mine", sweep_results.result_rows(jobs(3), states))
    assert sweep_results.write_partial_table(tmp_path, "mine", sweep_results.result_rows(jobs(2), states[:2])) is None
    assert len(read_table(tmp_path)) == 3
    assert sweep_results.write_partial_table(tmp_path, "other", []) is None


def test_ctrl_c_while_results_are_written_says_how_to_get_them(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "_report", interrupt)
    with pytest.raises(Interrupted, match=r"all jobs have ended: the same command with hydra.launcher.sweep=mine"):
        run_on(Cloud(), jobs(1), tmp_path, monkeypatch)


def test_ctrl_c_while_jobs_are_checked_ends_with_a_sentence_and_5(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "_compose_job", interrupt)
    monkeypatch.setattr(_core, "configure_log", lambda *args: None)
    sweep = sweep_state()
    sweep.hydra_context = object()
    sweep.config = OmegaConf.create({"hydra": {
        "hydra_logging": {}, "verbose": False, "sweep": {"dir": str(tmp_path)}, "job": {"name": "train"}}})
    with pytest.raises(SystemExit) as caught:
        _core.launch(sweep, [["a=1"]], 0)
    assert caught.value.code == 5
    assert capsys.readouterr().err == "dreambooth: interrupted before anything was submitted: repeat the command\n"


def test_an_interrupted_run_in_this_process_keeps_the_results_so_far(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of an interrupted run ends the process."""
    calls: list[Any] = []

    def run_job(**arguments: Any) -> JobReturn:
        if calls:
            sys.exit(5)
        calls.append(arguments)
        job_return = JobReturn(status=JobStatus.COMPLETED)
        job_return.return_value = 0.5
        return job_return

    monkeypatch.setattr(_core, "run_job", run_job)
    monkeypatch.setattr(_core, "configure_log", lambda *args: None)
    sweep = sweep_state(mode="local", sweep="mine")
    sweep.hydra_context, sweep.task_function = object(), print
    sweep.config = OmegaConf.create({"tracking": {}, "hydra": {
        "hydra_logging": {}, "verbose": False, "sweep": {"dir": str(tmp_path)}}})
    with pytest.raises(SystemExit):
        _core._run_in_process(sweep, [sweep.config] * 3, [[f"train.seed={i}"] for i in range(3)], 0)
    assert read_table(tmp_path) == {"#0": COMPLETED}
