"""TensorBoard's and W&B's files, opened by their own readers: they hold what the journal holds."""

import json
import math
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreambooth.errors import UserError
from dreambooth.tracking.journal import read
from dreambooth.tracking.tracker import Tracker, open_tracker
from tests.tracking.mlflow_servers import picture

pytestmark = pytest.mark.slow
Curves = dict[str, list[tuple[int, float]]]


def start(root: Path, kind: str) -> Tracker:
    return open_tracker(kind, root / "run", run_root=root, run_name="r", experiment="e", sweep="s")


def train(tracker: Tracker, root: Path, steps: range) -> None:
    tracker.log_params({"train.learning_rate": "1e-4"})
    tracker.set_tags({"git": "abc", "mlflow.note.content": "**a toy**"})
    tracker.set_tags({"branch": "main"})
    for step in steps:
        tracker.log_metrics(step, {"loss": 1 / (step + 1), "evaluate/objective": math.nan if step == 3 else step / 3})
    tracker.log_image(steps[-1], "samples/prompt_0", picture(root / "run/samples"))


def journal_curves(root: Path) -> Curves:
    curves: Curves = defaultdict(list)
    for entry, _ in read(root / "run/metrics.jsonl"):
        for key, value in entry.get("metrics", {}).items():
            curves[key].append((entry["step"], value))
    return curves


def tensorboard_curves(root: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "run/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(root: Path) -> list[Any]:
    """Return the records of all offline runs, in W&B's own message format.

    The package has no reader in Python any more. The file is a LevelDB log after 7 bytes: blocks of 32 KiB with chunks,
    each a checksum (4 bytes), a length (2 bytes), a type (1: whole, 2: first, 3: middle, 4: last part) and its data.
    """
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted((root / "run/wandb").glob("offline-run-*/run-*.wandb")):
        content, position, data = path.read_bytes(), 7, b""
        assert content.startswith(b":W&B")
        while position + 7 <= len(content):
            if 2**15 - position % 2**15 < 7:  # too little room for a header: the next block
                position += 2**15 - position % 2**15
            _, length, kind = struct.unpack_from("<IHB", content, position)
            data += content[position + 7:position + 7 + length]
            position += 7 + length
            if kind in (1, 4):
                records.append(wandb_internal_pb2.Record.FromString(data))
                data = b""
    return records


def wandb_curves(root: Path) -> Curves:
    curves: Curves = defaultdict(list)
    for record in wandb_records(root):
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for key in ("loss", "evaluate/objective"):
                if key in items:
                    curves[key].append((items["step"], float(items[key])))
    return curves


def test_tensorboard_has_the_curves_of_the_journal_also_after_a_kill(tmp_path: Path) -> None:
    code = ("import os, sys; from pathlib import Path; from tests.tracking.test_backends import start, train;"
            "root = Path(sys.argv[1]); tracker = start(root, 'tensorboard'); train(tracker, root, range(1, 5))\n"
            "while not any(file.stat().st_size > 500 for file in (root / 'run/tensorboard').glob('events*')): pass\n"
            "os._exit(9)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    tracker = start(tmp_path, "tensorboard")
    train(tracker, tmp_path, range(3, 9))
    tracker.close("FINISHED")
    expected = {key: [(step, float(np.float32(value))) for step, value in curve]
                for key, curve in journal_curves(tmp_path).items()}
    assert [step for step, _ in expected["loss"]] == list(range(1, 9))
    assert str(dict(sorted(tensorboard_curves(tmp_path).items()))) == str(dict(sorted(expected.items())))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("samples/prompt_0")] == [4, 8]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_wandb_offline_has_the_curves_of_the_journal_in_one_run(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (range(1, 5), range(5, 9)):
        tracker = start(tmp_path, "wandb")
        train(tracker, tmp_path, steps)
        tracker.close("FINISHED")
    assert str(dict(sorted(wandb_curves(tmp_path).items()))) == str(dict(sorted(journal_curves(tmp_path).items())))
    runs = [record.run for record in wandb_records(tmp_path) if record.HasField("run")]
    assert {run.run_id for run in runs} == {json.loads((tmp_path / "run/wandb.json").read_text())["run_id"]}
    assert {(run.project, run.display_name, run.run_group) for run in runs} == {("e", "r", "s")}
    assert "**a toy**" in {run.notes for run in runs}
    configs = [{item.key: json.loads(item.value_json) for item in record.config.update}
               for record in wandb_records(tmp_path) if record.HasField("config")]
    config = {key: value for update in configs for key, value in update.items()}
    expected = {"train.learning_rate": "1e-4", "tags.git": "abc", "tags.branch": "main"}
    assert config | expected == config


def test_wandb_without_a_key_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="type wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline"):
        start(tmp_path, "wandb")
