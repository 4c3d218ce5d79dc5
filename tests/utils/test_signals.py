"""Stop requests: what may be abandoned ends at once, everything else looks at the request, and Ctrl-C is a sentence."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dreambooth.errors import Interrupted, UserError
from dreambooth.utils.signals import StopRequest, catch_stop_signals

ROOT = Path(__file__).parents[2]


def request_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def interrupted(message: str) -> Iterator[StopRequest]:
    """Expect that the block ends in Interrupted, within a second."""
    began = time.monotonic()
    with pytest.raises(Interrupted, match=f"^SIGTERM: {re.escape(message)}$"), catch_stop_signals() as stop:
        yield stop
    assert time.monotonic() - began < 1


def test_a_stop_request_ends_work_that_may_be_abandoned_wherever_it_is() -> None:
    with interrupted("stopped; repeat the command") as stop, stop.at_once("stopped; repeat the command"):
        request_stop()
        time.sleep(60)


def test_a_library_that_catches_errors_cannot_keep_the_work_going() -> None:
    with interrupted("stopped") as stop, stop.at_once("stopped"):
        for _ in range(60):
            try:
                request_stop()
                time.sleep(1)
            except Exception:
                continue


def test_an_error_that_a_library_makes_of_the_end_is_a_stop() -> None:
    with interrupted("stopped") as stop, stop.at_once("stopped"):
        try:
            request_stop()
            time.sleep(60)
        except BaseException as error:
            raise RuntimeError("the download failed") from error


def test_an_error_without_a_stop_request_is_kept() -> None:
    with pytest.raises(UserError, match="no photo"), StopRequest().at_once():
        raise UserError("no photo")


def test_outside_of_such_work_a_request_is_only_recorded_and_keeps_more_work_from_beginning() -> None:
    with interrupted("stopped before the first step; repeat the command to continue") as stop:
        with stop.at_once():
            pass
        request_stop()
        assert stop.signal_name == "SIGTERM"
        with stop.at_once():
            raise AssertionError("work began after a stop request")


def test_a_second_signal_interrupts_everything() -> None:
    with pytest.raises(KeyboardInterrupt), catch_stop_signals():
        request_stop()
        request_stop()


def test_slurm_may_send_sigterm_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so to a job that it preempts without grace time; the run is then in the middle of its checkpoint."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    previous = signal.getsignal(signal.SIGTERM)
    with catch_stop_signals() as stop:
        request_stop()
        try:
            request_stop()
        except KeyboardInterrupt:
            pytest.fail("the second SIGTERM interrupted the run")
        assert stop.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) not in (previous, signal.SIG_DFL), "it would kill the process at its end"
    signal.signal(signal.SIGTERM, previous)
    with pytest.raises(KeyboardInterrupt), catch_stop_signals():
        request_stop()
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGTERM, previous)


def test_ctrl_c_while_libraries_are_imported_is_a_sentence(tmp_path: Path) -> None:
    """The package's import installs this, before a command imports anything large."""
    def run(name: str, code: str) -> tuple[int, str]:
        (tmp_path / name).write_text(f"import dreambooth\n{code}")
        done = subprocess.run([sys.executable, str(tmp_path / name)], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        return done.returncode, done.stderr

    assert run("dreambooth-train", "raise KeyboardInterrupt") == (5, "dreambooth: interrupted; repeat the command\n")
    code, text = run("dreambooth-train", "raise AssertionError")
    assert code == 1 and "Traceback" in text
    code, text = run("notebook.py", "raise KeyboardInterrupt")
    assert "Traceback" in text, "a program that only imports the package is changed"
