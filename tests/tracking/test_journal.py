"""The journal: no entry is lost or written twice, wherever its file was cut."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth.sweeps.trials import load_trial
from dreambooth.tracking import svg_charts
from dreambooth.tracking.journal import Journal, batches, read
from dreambooth.tracking.tracker import JournalTracker, open_tracker

pytestmark = pytest.mark.usefixtures("short_waits")

# ---- the journal


def fill(journal: Journal, steps: int) -> None:
    for step in range(steps):
        journal.log_metrics(step, {"loss": step / 7, "grad": math.inf if step % 2 else math.nan})
        journal.log_image(step, "samples/ä\n", journal.path.parent / f"{step}.png")
    journal.log_params({"lr": "1e-4", "prompt": "a\nb"})


def test_journal_form(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.log_metrics(3, {"loss": -math.inf})
    journal.log_image(3, "k", tmp_path / "samples" / "3.png")
    journal.log_artifact(Path("/etc/hostname"), "machine")
    first, second, third = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert first == {"time": first["time"], "step": 3, "metrics": {"loss": "-inf"}}
    assert abs(first["time"] / 1000 - time.time()) < 60
    assert (second["image"], second["key"]) == ("samples/3.png", "k")
    assert (third["artifact"], third["folder"]) == ("/etc/hostname", "machine")
    assert next(read(journal.path))[0]["metrics"] == {"loss": -math.inf}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_journal_cut_at_any_byte_is_continued(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    fill(Journal(path), 4)
    whole = path.read_bytes()
    entries = [str(entry) for entry, _ in read(path)]
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    left = [str(entry) for entry, _ in read(path)]
    assert left == entries[:whole[:cut].count(b"\n")]
    fill(Journal(path), 6)
    steps = [e["step"] for e, _ in read(path) if "metrics" in e]
    assert steps == list(range(6)) and [str(entry) for entry, _ in read(path)][:len(left)] == left
    assert sum("params" in e for e, _ in read(path)) == 1
    offsets = [0, *(after for _, after in read(path))]
    assert [next(read(path, offset))[1] for offset in offsets[:-1]] == offsets[1:]


DAMAGED = [
    "[]", "3", '"metrics"', '["metrics"]', "{}", '{"metrics": {"loss": 1}}', '{"time": 1, "metrics": {"loss": 1}}',
    '{"time": 1, "step": "1", "metrics": {"loss": 1}}', '{"time": 1, "step": 1, "metrics": [1]}',
    '{"time": 1, "step": 1, "metrics": {"loss": null}}', '{"time": 1, "step": 1, "image": "a.png"}',
    '{"time": 1, "artifact": "a"}', '{"time": 1, "params": ["a"]}', '{"time": 1, "tags": {"sweep": ["s"]}}',
    '{"time": 1, "input": null}', '{"time": 1, "status": {}}', '{"time": null, "status": "FINISHED"}', "\udcff",
    "[" * 9**5]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_ignored_with_a_warning(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(Journal(path), 2)
    whole = [entry for entry, _ in read(path)]
    path.write_bytes(line.encode(errors="surrogateescape") + b"\n" + path.read_bytes())
    assert str([entry for entry, _ in read(path)]) == str(whole)
    fill(Journal(path), 2)
    assert len(list(read(path))) == len(whole), "an entry was written twice"
    assert f"1 line of {path} cannot be read" in caplog.text
    svg_charts.write_loss_curves(tmp_path)
    load_trial(tmp_path)


def test_one_point_per_step_and_key(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    assert journal.log_metrics(1, {"loss": 1.0}) and not journal.log_metrics(1, {"loss": 2.0})
    assert journal.log_metrics(1, {"loss": 3.0, "lr": 0.5})
    assert [entry["metrics"] for entry, _ in read(journal.path)] == [{"loss": 1.0}, {"lr": 0.5}]


def test_repeated_entries_are_not_written_again(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("1")
    for first in (True, False):
        journal = Journal(tmp_path / "metrics.jsonl")
        assert journal.log_params({"a": "1"}) is journal.set_tags({"a": "1"}) is journal.log_artifact(file) is first
        assert journal.log_image(0, "k", file) is first
    file.write_text("22")
    assert journal.log_artifact(file) and not journal.log_artifact(file) and journal.log_artifact(file, "copy")
    assert journal.log_params({"a": "2"})
    with pytest.raises(ValueError, match="FINISHED"):
        journal.set_status("DONE")


def test_a_failed_write_leaves_the_journal_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path / "metrics.jsonl"), os.write
    journal.log_metrics(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: write(file, line[:9]))  # the disk is full after 9 bytes
        with pytest.raises(OSError, match="No space"):
            journal.log_metrics(2, {"loss": 2.0})
    assert journal.log_metrics(2, {"loss": 2.0})
    assert [entry["step"] for entry, _ in read(journal.path)] == [1, 2]


def test_a_damaged_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Journal(path).log_metrics(1, {"a": 1.0})
    with path.open("ab") as file:
        file.write(b"\0\0\0\n[1]\n7\n")
    journal = Journal(path)
    journal.log_metrics(2, {"a": 1.0})
    assert [entry["step"] for entry, _ in read(path)] == [1, 2]


@given(st.lists(st.one_of(st.just("status"), st.integers(1, 1500)), max_size=12))
def test_batches_keep_order_and_stay_small(kinds: list[Any]) -> None:
    entries = [({"status": "RUNNING"} if k == "status" else {"metrics": dict.fromkeys(map(str, range(k)), 0.0)}, i)
               for i, k in enumerate(kinds)]
    sent = list(batches(entries))
    assert [entry for batch, _ in sent for entry in batch] == [entry for entry, _ in entries]
    for batch, after in sent:
        assert entries[after][0] is batch[-1]
        assert len(batch) == 1 or sum(len(entry["metrics"]) for entry in batch) <= 1000


# ---- MLflow with a server that works


def test_null_tracker_only_journals(tmp_path: Path) -> None:
    tracker = open_tracker("none", tmp_path / "run", run_root=tmp_path, run_name="r")
    assert isinstance(tracker, JournalTracker) and tracker.log_metrics(1, {"loss": 1.0}) and tracker.url() is None
    tracker.close("FINISHED")
    tracker.close("FINISHED")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_steps_without_a_value_are_counted(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (1, 2, 4, 9):
        journal.log_metrics(step, {"loss": 0.5})
    journal.close()
    again = Journal(tmp_path / "metrics.jsonl")
    assert [again.count_missing("loss", last) for last in (0, 2, 4, 6)] == [0, 0, 1, 3]
    assert again.count_missing("lr", 2) == 2
