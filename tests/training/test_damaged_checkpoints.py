"""Damaged checkpoints: any change of any file is noticed, the checkpoint is skipped with a warning and made again."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreambooth.errors import Diverged, UserError
from dreambooth.runs import checkpoint_files, run_folder
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.storage import manifest
from dreambooth.training import checkpoint
from dreambooth.training.hooks import CheckpointHook, swap_in_ema
from dreambooth.training.step import Objective, TrainState, train_step
from tests.support.runs import flip_bit
from tests.support.toy_model import ToyModel, make_batches, make_schedule, make_state

FILES = ("ema.safetensors", "optimizer.safetensors", "trained.safetensors", "state.json", manifest.NAME)


def save(folder: Path, *steps: int, model: torch.nn.Module | None = None) -> list[Path]:
    """Write a checkpoint after each of these steps of one training run."""
    state, paths = make_state(model or ToyModel()), []
    for step in steps:
        while state.step < step:
            train_step(state, make_batches()(state.step), Objective(make_schedule()), Engine(), 1.0)
        paths.append(checkpoint.save(folder, state, state.model, Engine().scaler, 9))
    return paths


def edit_state(path: Path, edit: Callable[[Any], Any]) -> None:
    numbers = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(edit(numbers)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0.1, 0.5, 0.97])
def test_one_changed_bit_is_noticed(name: str, at: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = save(tmp_path, 1, 2)
    flip_bit(second / name, at)
    assert checkpoint_files.latest(tmp_path) == first
    assert f"{second} is damaged and is skipped (" in caplog.text
    assert f"({name} " in caplog.text or name == manifest.NAME  # the digest of another file may have changed


def test_a_checkpoint_without_checksums_is_compared_by_size(tmp_path: Path) -> None:
    """Checkpoints of earlier versions have no manifest."""
    first, second = save(tmp_path, 1, 2)
    (second / manifest.NAME).unlink()
    assert checkpoint_files.latest(tmp_path) == second
    (second / "ema.safetensors").write_bytes(b"cut")
    assert checkpoint_files.latest(tmp_path) == first


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "a list": lambda numbers: [numbers],
    "no step": lambda numbers: {key: value for key, value in numbers.items() if key != "step"},
    "null optimizer": lambda numbers: numbers | {"optimizer": None},
    "null schedule": lambda numbers: numbers | {"schedule": None},
    "step in words": lambda numbers: numbers | {"step": [2]},
    "null sizes": lambda numbers: numbers | {"sizes": None},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_of_an_earlier_version_is_skipped(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = save(tmp_path, 1, 2)
    (second / manifest.NAME).unlink()
    edit_state(second, DAMAGE[damage])
    newest, state = checkpoint_files.latest(tmp_path), make_state(ToyModel())
    assert newest is not None
    used = checkpoint.restore_newest(newest, state, state.model, Engine(), "auto")
    assert (used, state.step) == (first, 1)
    assert str(second) in caplog.text
    if newest == second:
        with pytest.raises(UserError, match=r"step-000002 cannot be resumed .*checkpoint\.resume=never"):
            checkpoint.restore_newest(second, state, state.model, Engine(), str(second))


def test_if_no_checkpoint_fits_the_newest_is_the_error(tmp_path: Path) -> None:
    """Training then does not start over by itself, because another setting may be the reason."""
    _, second = save(tmp_path, 1, 2)
    other = make_state(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"step-000002 cannot be resumed here.*checkpoint\.resume=never"):
        checkpoint.restore_newest(second, other, other.model, Engine(), "auto")


def test_a_damaged_checkpoint_to_resume_from_is_an_error_before_anything_moves(tmp_path: Path) -> None:
    [path] = save(tmp_path / "checkpoints", 1)
    flip_bit(path / "trained.safetensors", 0.9)
    with pytest.raises(UserError, match=r"step-000001 cannot be resumed \(trained\.safetensors has other content\)"):
        run_folder.find_resume_point(tmp_path, str(path))
    assert path.is_dir()


def test_a_skipped_checkpoint_is_written_again_and_never_outlives_a_sound_one(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1, 3)
    expected = (second / "trained.safetensors").read_bytes()
    flip_bit(second / "trained.safetensors", 0.9)
    state = make_state(ToyModel())
    checkpoint.restore_newest(first, state, state.model, Engine(), "auto")
    for step in (2, 3):
        train_step(state, make_batches()(state.step), Objective(make_schedule()), Engine(), 1.0)
        checkpoint.save(tmp_path, state, state.model, Engine().scaler, 1)
        assert [path.name for path in tmp_path.iterdir()] == [f"step-{step:06d}"]
    assert (second / "trained.safetensors").read_bytes() == expected


# ---- values that are not finite


def hooks_of(folder: Path, state: TrainState) -> tuple[Any, CheckpointHook]:
    recipe: Any = SimpleNamespace(run_dir=folder, checkpoint=SimpleNamespace(keep=2))
    setup: Any = SimpleNamespace(state=state, trained=state.model)
    return setup, CheckpointHook(setup, Engine(), MemoryMeter(torch.device("cpu"), str), recipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_are_not_finite_are_neither_saved_nor_drawn(
    value: float, averaged: bool, tmp_path: Path
) -> None:
    state = make_state(ToyModel())
    train_step(state, make_batches()(0), Objective(make_schedule()), Engine(), 1.0)
    setup, saving = hooks_of(tmp_path, state)
    saving.save()
    state.step += 1
    assert state.ema is not None
    broken = state.ema.average if averaged else dict(state.model.named_parameters())
    with torch.no_grad():
        broken["unet.weight"].view(-1)[4] = value
    for act in (saving.save, lambda: swap_in_ema(setup), lambda: swap_in_ema(setup, exact=True)):
        with pytest.raises(Diverged, match=r"after step 2, .* unet\.weight is not finite: .*train\.learning_rate"):
            act()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
