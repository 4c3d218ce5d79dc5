"""The thread between the journal and a backend on this machine, with backends that work, fail and hang."""

import threading
from pathlib import Path
from typing import Any

import pytest

from dreambooth.tracking import journal_follower
from dreambooth.tracking.tracker import JournalTracker


class Memory:
    """A backend that keeps the metrics; it may fail at a step, refuse a step, or hang when it is opened."""

    name = "Memory"

    def __init__(self, fails_at: int | None = None, refuses: int | None = None,
                 waits_for: threading.Event | None = None) -> None:
        self.fails_at, self.refuses, self.waits_for = fails_at, refuses, waits_for
        self.steps: list[int] = []
        self.closed = False

    def open(self) -> int:
        if self.waits_for:
            self.waits_for.wait(30)
        return 0

    def write(self, entry: dict[str, Any]) -> None:
        if "metrics" in entry:
            if entry["step"] == self.fails_at:
                raise OSError("no connection")
            if entry["step"] == self.refuses:
                raise ValueError("not a number")
            self.steps.append(entry["step"])

    def flush(self, offset: int) -> None: ...

    def close(self) -> None:
        self.closed = True


def track(folder: Path, backend: Memory, steps: range) -> None:
    tracker = JournalTracker(folder, backends=[backend])
    for step in steps:
        tracker.log_metrics(step, {"loss": 1.0})
    tracker.close("FINISHED")
    tracker.close("FINISHED")


def test_a_backend_receives_all_entries_in_order(tmp_path: Path) -> None:
    backend = Memory()
    track(tmp_path, backend, range(1, 6))
    assert backend.steps == [1, 2, 3, 4, 5] and backend.closed


def test_a_run_without_a_new_step_sends_what_the_journal_has(tmp_path: Path) -> None:
    track(tmp_path, Memory(), range(1, 4))
    backend = Memory()
    track(tmp_path, backend, range(0))
    assert backend.steps == [1, 2, 3]


def test_a_failure_is_one_warning_and_the_journal_keeps_everything(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = Memory(fails_at=2)
    track(tmp_path, backend, range(1, 6))
    assert [record.getMessage() for record in caplog.records] == [
        "Memory fails (OSError: no connection); the run continues, and metrics.jsonl keeps everything"]
    assert backend.steps == [1] and backend.closed
    later = Memory()
    track(tmp_path, later, range(0))
    assert later.steps == [1, 2, 3, 4, 5]


def test_an_entry_that_is_refused_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = Memory(refuses=2)
    track(tmp_path, backend, range(1, 4))
    assert backend.steps == [1, 3] and "does not accept an entry (not a number)" in caplog.text


def test_a_backend_that_hangs_is_reported_at_the_end(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_follower, "CLOSE_TIMEOUT", 0.05)
    answer = threading.Event()
    track(tmp_path, Memory(waits_for=answer), range(1, 3))
    answer.set()
    assert "Memory has not received everything in 0.05 s; it stays in metrics.jsonl" in caplog.text
