"""Checkpoints: bit-equal, no pickle, the old one goes only after the new one is whole, failures keep what there was."""

import errno
import json
from pathlib import Path

import pytest
import torch
from test_core import Toy, batches, schedule, state

from dreambooth import checkpoint, files
from dreambooth.engine import Engine
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.step import Objective, TrainState, train_step


def train(found: TrainState, until: int) -> TrainState:
    while found.step < until:
        train_step(found, batches()(found.step), Objective(schedule()), Engine(), 1.0)
    return found


def save(folder: Path, found: TrainState, keep: int = 2) -> Path:
    return checkpoint.save(folder, found, found.model, Engine().scaler, keep)


def everything(found: TrainState) -> list[torch.Tensor]:
    assert found.ema is not None
    entries = found.optimizer.state_dict()["state"]
    moments = [entries[index][name] for index in sorted(entries) for name in sorted(entries[index])]
    return [*found.model.state_dict().values(), *found.ema.average.values(), *moments]


def test_restored_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = train(state(Toy()), 6)
    path = save(tmp_path, train(state(Toy()), 3))
    again = state(Toy())
    checkpoint.restore(path, again, again.model, Engine().scaler)
    train(again, 6)
    assert all(a.equal(b) for a, b in zip(everything(again), everything(straight), strict=True))
    assert again.schedule.state_dict() == straight.schedule.state_dict()
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_rotation_keeps_the_newest_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    publish, remove = files.publish, files.remove_folder
    monkeypatch.setattr(files, "publish", lambda *paths: (events.append("publish"), publish(*paths)))
    monkeypatch.setattr(files, "remove_folder", lambda path: (events.append("remove_folder"), remove(path)))
    found = state(Toy())
    for step in (1, 2, 3):
        save(tmp_path, train(found, step), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000003"]
    assert events == ["publish", "publish", "remove_folder", "publish", "remove_folder"]


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = train(state(Toy()), 1)
    first = save(tmp_path, found)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DoesNotFit, match="free some space"):
        save(tmp_path, train(found, 2), keep=1)
    assert checkpoint.latest(tmp_path) == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000001"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    found = state(Toy())
    first, second = (save(tmp_path, train(found, step)) for step in (1, 2))
    (second / "ema.safetensors").write_bytes(b"cut")
    assert checkpoint.latest(tmp_path) == first


def test_another_models_checkpoint_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = save(tmp_path, train(state(Toy()), 1))
    other = state(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"checkpoint\.resume=never"):
        checkpoint.restore(path, other, other.model, Engine().scaler)


def test_eight_bit_state_survives(tmp_path: Path) -> None:
    given = {"param_groups": [{"lr": 0.1}], "state": {0: {"step": 3, "state1": torch.arange(9, dtype=torch.uint8)}}}
    tensors, rest = checkpoint._flatten(given)
    back = checkpoint._unflatten(tensors, json.loads(json.dumps(rest)))
    assert back["state"][0]["state1"].equal(given["state"][0]["state1"])  # type: ignore[index]
    assert (back["state"][0]["step"], back["param_groups"]) == (3, [{"lr": 0.1}])
