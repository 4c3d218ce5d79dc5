"""Checkpoints: bit-equal, no pickle, the old one goes only after the new one is whole, failures keep what there was."""

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from dreambooth.errors import DoesNotFit, UserError
from dreambooth.runtime.engine import Engine
from dreambooth.training import checkpoint
from dreambooth.training.step import Objective, TrainState, train_step
from dreambooth.utils import atomic_files
from tests.support.toy_model import Toy, batches, schedule, state


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


def test_another_runs_checkpoint_does_not_bring_its_settings(tmp_path: Path) -> None:
    """checkpoint.resume=PATH with another learning rate: state from there, settings from here."""
    def made(rate: float, decay: float) -> TrainState:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
        return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step))

    def step(found: TrainState) -> None:
        found.model(torch.ones(1, 3)).sum().backward()
        found.optimizer.step()
        found.schedule.step()
        found.step += 1

    first, second = made(1e-2, 0.1), made(1e-4, 0.2)
    step(first), step(first)
    checkpoint.restore(save(tmp_path, first), second, second.model, Engine().scaler)
    [group] = second.optimizer.param_groups
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (1e-4 * 0.25, 1e-4, 0.2)
    assert second.schedule.get_last_lr() == [1e-4 * 0.25]
    step(second)
    assert group["lr"] == 1e-4 * 0.125


def test_a_checkpoint_of_another_optimizer_is_refused_in_a_sentence(tmp_path: Path) -> None:
    def made(kind: type[torch.optim.Optimizer]) -> TrainState:
        model = torch.nn.Linear(3, 2)
        optimizer = kind(model.parameters(), lr=1e-2)  # type: ignore[call-arg]
        return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))

    path, other = save(tmp_path, made(torch.optim.AdamW)), made(torch.optim.SGD)
    with pytest.raises(UserError, match=r"another optimizer.*checkpoint\.resume=never"):
        checkpoint.restore(path, other, other.model, Engine().scaler)


def test_a_checkpoint_without_loss_scaling_goes_on_with_it(tmp_path: Path) -> None:
    path, again = save(tmp_path, train(state(Toy()), 1)), state(Toy())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    checkpoint.restore(path, again, again.model, scaler)
    assert (scaler.get_scale(), again.step) == (64.0, 1)


def test_a_run_with_channels_innermost_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The fused kernel would mix up the moments of a weight that lies in memory otherwise than they do."""
    def made() -> TrainState:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))

    def step(found: TrainState, count: int) -> TrainState:
        for _ in range(count):
            found.optimizer.zero_grad()
            found.model(torch.arange(300.0).view(1, 3, 10, 10).sin()).square().mean().backward()
            found.optimizer.step()
        return found

    straight, half, again = step(made(), 4), step(made(), 2), made()
    path = checkpoint.save(tmp_path, half, half.model, Engine().scaler, 1)
    checkpoint.restore(path, again, again.model, Engine().scaler)
    step(again, 2)
    assert all(a.equal(b) for a, b in zip(again.model.parameters(), straight.model.parameters(), strict=True))


def test_rotation_keeps_the_newest_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    publish, remove = atomic_files.publish, atomic_files.remove_folder
    monkeypatch.setattr(atomic_files, "publish", lambda *paths: (events.append("publish"), publish(*paths)))
    monkeypatch.setattr(atomic_files, "remove_folder", lambda path: (events.append("remove_folder"), remove(path)))
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


def test_a_checkpoint_of_another_format_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = save(tmp_path, train(state(Toy()), 1))
    numbers = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(numbers | {"format": 99}))
    with pytest.raises(UserError, match=r"it has format 99, this version reads 1.*checkpoint\.resume=never"):
        checkpoint.restore(path, again := state(Toy()), again.model, Engine().scaler)


def test_the_newest_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    found = train(state(Toy()), 1)
    for found.step in (999_999, 1_000_000):
        save(tmp_path, found)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step-1000000"


def test_eight_bit_state_survives(tmp_path: Path) -> None:
    given = {"param_groups": [{"lr": 0.1}], "state": {0: {"step": 3, "state1": torch.arange(9, dtype=torch.uint8)}}}
    tensors, rest = checkpoint._flatten(given)
    back = checkpoint._unflatten(tensors, json.loads(json.dumps(rest)))
    assert back["state"][0]["state1"].equal(given["state"][0]["state1"])  # type: ignore[index]
    assert (back["state"][0]["step"], back["param_groups"]) == (3, [{"lr": 0.1}])


def restored(path: Path) -> TrainState:
    again = state(Toy())
    checkpoint.restore(path, again, again.model, Engine().scaler)
    return again


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    found, again = train(state(Toy()), 3), state(Toy())
    found.skipped, found.skipped_in_row = 2, 1
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (512.0, 8.0))
    path = checkpoint.save(tmp_path, found, found.model, scaler, 2)
    checkpoint.restore(path, again, again.model, other)
    assert all(a.equal(b) for a, b in zip(everything(again), everything(found), strict=True))
    assert (again.step, again.skipped, again.skipped_in_row) == (checkpoint.step_of(path), 2, 1) == (3, 2, 1)
    assert again.ema is not None
    assert again.ema.updates == 3
    assert again.schedule.get_last_lr() == found.schedule.get_last_lr()
    assert other.state_dict() == scaler.state_dict()


def test_no_pickle_in_a_checkpoint(tmp_path: Path) -> None:
    for file in save(tmp_path, train(state(Toy()), 1)).iterdir():
        head = file.read_bytes()[:9]
        assert b"{" in (head[:1], head[8:]), f"{file.name} is neither JSON nor safetensors"
        assert not head.startswith((b"\x80", b"PK")), f"{file.name} may be a pickle"


class Crash(Exception):
    """Power is gone."""


@pytest.mark.parametrize("module, function, before", [
    (checkpoint, "save_file", 0), (checkpoint, "save_file", 2),
    (atomic_files, "sync", 0), (atomic_files, "sync", 3), (atomic_files, "sync", 4), (atomic_files, "publish", 0),
])
def test_a_crash_while_saving_leaves_the_earlier_checkpoint(
    module: object, function: str, before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, train(state(Toy()), 1))
    calls, original = iter(range(99)), getattr(module, function)

    def crashing(*args: object) -> None:
        if next(calls) == before:
            raise Crash
        original(*args)

    monkeypatch.setattr(module, function, crashing)
    with pytest.raises(Crash):
        save(tmp_path, train(state(Toy()), 2), keep=1)
    assert checkpoint.latest(tmp_path) == first
    assert restored(first).step == 1


@pytest.mark.parametrize("function", ["remove_folder", "shutil.rmtree"])
def test_a_crash_while_rotating_leaves_the_new_checkpoint(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, train(state(Toy()), 1))
    removing: list[Path] = []

    def crashing(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            removing.append(path)
            raise Crash

    monkeypatch.setattr(f"dreambooth.utils.atomic_files.{function}", crashing)
    with pytest.raises(Crash):
        save(tmp_path, train(state(Toy()), 2), keep=1)
    monkeypatch.undo()
    newest = checkpoint.latest(tmp_path)
    assert (len(removing), newest) == (1, tmp_path / "step-000002")
    assert restored(newest).step == 2
    atomic_files.sweep(tmp_path)
    save(tmp_path, train(restored(newest), 3), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000003"], "the next save tidies up"


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = atomic_files.sync, Path.replace
    monkeypatch.setattr(atomic_files, "sync", lambda path: (events.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append(f"rename {to.name}"), replace(path, to)))
    save(tmp_path / "checkpoints", train(state(Toy()), 1))
    whole = ["ema.safetensors", "optimizer.safetensors", "state.json", "trained.safetensors", ".writing-step-000001"]
    assert events == [*(f"sync {name}" for name in whole), "rename step-000001", "sync checkpoints"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no state", "half a state"])
def test_damage_is_seen_and_said(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = state(Toy())
    first, second = (save(tmp_path, train(found, step)) for step in (1, 2))
    weights, numbers = second / "trained.safetensors", second / "state.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "half a state":
        numbers.write_text(numbers.read_text()[:40])
    else:
        (weights if damage == "gone" else numbers).unlink()
    assert checkpoint.latest(tmp_path) == first
    assert "step-000002 is damaged and is passed over" in caplog.text


def test_a_damaged_checkpoint_never_counts_as_kept(tmp_path: Path) -> None:
    """Steps 1 and 4 are there, 4 is damaged; training goes on from 1 and saves 2."""
    save(tmp_path, train(state(Toy()), 1))
    (save(tmp_path, train(state(Toy()), 4)) / "ema.safetensors").write_bytes(b"cut")
    save(tmp_path, train(state(Toy()), 2), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000002"]


def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(tmp_path: Path) -> None:
    found = train(state(Toy()), 2)
    (save(tmp_path, found) / "ema.safetensors").write_bytes(b"cut")
    assert restored(save(tmp_path, found)).step == 2


@pytest.mark.parametrize("damage", [b"", b"cut", b"\0" * 600])
def test_an_unreadable_checkpoint_is_refused_in_a_sentence(damage: bytes, tmp_path: Path) -> None:
    """Asked for by checkpoint.resume=PATH, so that nobody looked at it before."""
    path = save(tmp_path, train(state(Toy()), 1))
    (path / "trained.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match=r"checkpoint\.resume=never"):
        restored(path)


def test_a_checkpoint_of_other_shapes_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """The same names in another size: Stable Diffusion 1.5 and 2.1."""
    path, model = save(tmp_path, train(state(Toy()), 1)), Toy()
    model.unet = torch.nn.Conv2d(1, 2, 3, padding=1, dtype=torch.float64)
    other = state(model)
    with pytest.raises(UserError, match="2 weights of step-000001 do not match this model"):
        checkpoint.restore(path, other, other.model, Engine().scaler)


def test_safetensors_own_error_on_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk safetensors raises SafetensorError, which is no OSError (seen on a full tmpfs)."""
    def full(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    first = save(tmp_path, train(state(Toy()), 1))
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DoesNotFit, match="No space left") as caught:
        save(tmp_path, train(state(Toy()), 2), keep=1)
    assert caught.value.exit_code == 3
    assert checkpoint.latest(tmp_path) == first


NUMBERS = st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype), st.lists(st.integers(0, 255), max_size=6),
    st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.int64]))
ENTRIES = st.dictionaries(st.from_regex(r"[a-z_.]{1,9}", fullmatch=True), NUMBERS | TENSORS, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 300), ENTRIES, max_size=4))
def test_any_optimizer_state_survives(entries: dict[int, dict[str, object]]) -> None:
    """8-bit tensors of bitsandbytes, plain numbers, a step that is a number or a tensor."""
    groups = [{"lr": 0.1, "betas": [0.9, 0.999], "params": list(entries)}]
    tensors, rest = checkpoint._flatten({"state": entries, "param_groups": groups})
    back = checkpoint._unflatten(tensors, json.loads(json.dumps(rest)))
    assert back["param_groups"] == groups
    assert back["state"].keys() == entries.keys()
    for index, values in entries.items():
        assert back["state"][index].keys() == values.keys()
        for name, value in values.items():
            again = back["state"][index][name]
            assert type(again) is type(value)
            if isinstance(value, torch.Tensor):
                assert again.dtype == value.dtype
                assert again.equal(value)
            else:
                assert again == value


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep/result.json"
    atomic_files.write_json(path, {"a": 1})
    with pytest.raises(Crash), atomic_files.whole_file(path) as aside:
        aside.write_text("half")
        raise Crash
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_two_pods_write_one_file_and_each_has_its_own_aside(tmp_path: Path) -> None:
    """Process numbers are equal in containers."""
    path = tmp_path / "a"
    with atomic_files.whole_file(path) as first:
        first.write_text("first")
        with atomic_files.whole_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second" and first.is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"] and path.read_text() == "first"


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_files.whole_folder(path) as aside:
        (aside / "old").write_text("1")
    with pytest.raises(Crash), atomic_files.whole_folder(path) as aside:
        (aside / "new").write_text("half")
        raise Crash
    assert [entry.name for entry in path.iterdir()] == ["old"]
    with atomic_files.whole_folder(path) as aside:
        (aside / "new").write_text("2")
    assert [entry.name for entry in path.iterdir()] == ["new"], "replaced, not mixed"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
