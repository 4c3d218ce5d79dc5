"""Checkpoints: resumed bit for bit, without pickle, rotated only after the new one is complete, safe from failures."""

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from dreambooth.errors import DoesNotFit, UserError
from dreambooth.runs import checkpoint_files
from dreambooth.runtime.engine import Engine
from dreambooth.storage import manifest
from dreambooth.training import checkpoint
from dreambooth.training.step import Objective, TrainState, train_step
from dreambooth.utils import atomic_files
from tests.support.toy_model import ToyModel, make_batches, make_schedule, make_state


def train(state: TrainState, until: int) -> TrainState:
    """Train until `until` steps are completed."""
    while state.step < until:
        train_step(state, make_batches()(state.step), Objective(make_schedule()), Engine(), 1.0)
    return state


def save(folder: Path, state: TrainState, keep: int = 2) -> Path:
    return checkpoint.save(folder, state, state.model, Engine().scaler, keep)


def restore(path: Path) -> TrainState:
    state = make_state(ToyModel())
    checkpoint.restore(path, state, state.model, Engine().scaler)
    return state


def all_tensors(state: TrainState) -> list[torch.Tensor]:
    """The weights, the EMA and the optimizer's state."""
    assert state.ema is not None
    entries = state.optimizer.state_dict()["state"]
    moments = [entries[index][name] for index in sorted(entries) for name in sorted(entries[index])]
    return [*state.model.state_dict().values(), *state.ema.average.values(), *moments]


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path: Path) -> None:
    uninterrupted = train(make_state(ToyModel()), 6)
    path = save(tmp_path, train(make_state(ToyModel()), 3))
    resumed = train(restore(path), 6)
    assert all(a.equal(b) for a, b in zip(all_tensors(resumed), all_tensors(uninterrupted), strict=True))
    assert resumed.lr_scheduler.state_dict() == uninterrupted.lr_scheduler.state_dict()
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_another_number_of_photos_per_step_is_named_when_a_run_resumes(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for saved, current, words in ((6, 4, "type train.global_batch_size=6"), (6, 6, ""), (None, 4, "")):
        state = make_state(ToyModel())
        state.step, state.samples_per_step = 2, saved
        path = save(tmp_path / f"{saved}-{current}", state)
        state.samples_per_step = current
        caplog.clear()
        checkpoint.restore(path, state, state.model, Engine().scaler)
        assert words in caplog.text and bool(caplog.text) is bool(words)


def test_hyperparameters_are_those_of_the_resuming_run(tmp_path: Path) -> None:
    """checkpoint.resume=PATH with another learning rate: the state is loaded, the hyperparameters are kept."""
    def build(rate: float, decay: float) -> TrainState:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
        return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step))

    def step(state: TrainState) -> None:
        state.model(torch.ones(1, 3)).sum().backward()
        state.optimizer.step()
        state.lr_scheduler.step()
        state.step += 1

    first, second = build(1e-2, 0.1), build(1e-4, 0.2)
    step(first), step(first)
    checkpoint.restore(save(tmp_path, first), second, second.model, Engine().scaler)
    [group] = second.optimizer.param_groups
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (1e-4 * 0.25, 1e-4, 0.2)
    assert second.lr_scheduler.get_last_lr() == [1e-4 * 0.25]
    step(second)
    assert group["lr"] == 1e-4 * 0.125


def test_a_checkpoint_of_another_optimizer_is_a_user_error(tmp_path: Path) -> None:
    def build(kind: type[torch.optim.Optimizer]) -> TrainState:
        model = torch.nn.Linear(3, 2)
        optimizer = kind(model.parameters(), lr=1e-2)  # type: ignore[call-arg]
        return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))

    path, other = save(tmp_path, build(torch.optim.AdamW)), build(torch.optim.SGD)
    with pytest.raises(UserError, match=r"another optimizer.*checkpoint\.resume=never"):
        checkpoint.restore(path, other, other.model, Engine().scaler)


def test_a_checkpoint_without_loss_scaling_can_be_resumed_with_it(tmp_path: Path) -> None:
    path, resumed = save(tmp_path, train(make_state(ToyModel()), 1)), make_state(ToyModel())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    checkpoint.restore(path, resumed, resumed.model, scaler)
    assert (scaler.get_scale(), resumed.step) == (64.0, 1)


def test_a_channels_last_model_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The fused kernel would mix up the moments of a weight if their memory layout differed from that of the weight."""
    def build() -> TrainState:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))

    def step(state: TrainState, count: int) -> TrainState:
        for _ in range(count):
            state.optimizer.zero_grad()
            state.model(torch.arange(300.0).view(1, 3, 10, 10).sin()).square().mean().backward()
            state.optimizer.step()
        return state

    uninterrupted, stopped, resumed = step(build(), 4), step(build(), 2), build()
    path = checkpoint.save(tmp_path, stopped, stopped.model, Engine().scaler, 1)
    checkpoint.restore(path, resumed, resumed.model, Engine().scaler)
    step(resumed, 2)
    assert all(a.equal(b) for a, b in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True))


def test_rotation_removes_the_oldest_after_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    publish, remove = atomic_files.publish, atomic_files.remove_folder
    monkeypatch.setattr(atomic_files, "publish", lambda *paths: (events.append("publish"), publish(*paths)))
    monkeypatch.setattr(atomic_files, "remove_folder", lambda path: (events.append("remove_folder"), remove(path)))
    state = make_state(ToyModel())
    for step in (1, 2, 3):
        save(tmp_path, train(state, step), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000003"]
    assert events == ["publish", "publish", "remove_folder", "publish", "remove_folder"]


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = train(make_state(ToyModel()), 1)
    first = save(tmp_path, state)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DoesNotFit, match="free some space"):
        save(tmp_path, train(state, 2), keep=1)
    assert checkpoint_files.latest(tmp_path) == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000001"]


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    state = make_state(ToyModel())
    first, second = (save(tmp_path, train(state, step)) for step in (1, 2))
    (second / "ema.safetensors").write_bytes(b"cut")
    assert checkpoint_files.latest(tmp_path) == first


def test_a_checkpoint_of_another_model_is_a_user_error(tmp_path: Path) -> None:
    path = save(tmp_path, train(make_state(ToyModel()), 1))
    other = make_state(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"checkpoint\.resume=never"):
        checkpoint.restore(path, other, other.model, Engine().scaler)


def test_a_checkpoint_of_another_format_is_a_user_error(tmp_path: Path) -> None:
    path = save(tmp_path, train(make_state(ToyModel()), 1))
    numbers = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(numbers | {"format": 99}))
    with pytest.raises(UserError, match=r"it has format 99, this version reads 1.*checkpoint\.resume=never"):
        restore(path)


def test_the_newest_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    state = train(make_state(ToyModel()), 1)
    for state.step in (999_999, 1_000_000):
        save(tmp_path, state)
    newest = checkpoint_files.latest(tmp_path)
    assert newest is not None and newest.name == "step-1000000"


def test_eight_bit_state_is_saved_and_loaded(tmp_path: Path) -> None:
    saved = {"param_groups": [{"lr": 0.1}], "state": {0: {"step": 3, "state1": torch.arange(9, dtype=torch.uint8)}}}
    tensors, rest = checkpoint._flatten(saved)
    loaded = checkpoint._unflatten(tensors, json.loads(json.dumps(rest)))
    assert loaded["state"][0]["state1"].equal(saved["state"][0]["state1"])  # type: ignore[index]
    assert (loaded["state"][0]["step"], loaded["param_groups"]) == (3, [{"lr": 0.1}])


def test_the_whole_state_is_restored(tmp_path: Path) -> None:
    state, resumed = train(make_state(ToyModel()), 3), make_state(ToyModel())
    state.skipped, state.skipped_in_row = 2, 1
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (512.0, 8.0))
    path = checkpoint.save(tmp_path, state, state.model, scaler, 2)
    checkpoint.restore(path, resumed, resumed.model, other)
    assert all(a.equal(b) for a, b in zip(all_tensors(resumed), all_tensors(state), strict=True))
    assert (resumed.step, resumed.skipped, resumed.skipped_in_row) == (3, 2, 1)
    assert checkpoint_files.step_of(path) == 3
    assert resumed.ema is not None
    assert resumed.ema.updates == 3
    assert resumed.lr_scheduler.get_last_lr() == state.lr_scheduler.get_last_lr()
    assert other.state_dict() == scaler.state_dict()


def test_no_pickle_in_a_checkpoint(tmp_path: Path) -> None:
    for file in save(tmp_path, train(make_state(ToyModel()), 1)).iterdir():
        head = file.read_bytes()[:9]
        assert b"{" in (head[:1], head[8:]), f"{file.name} is neither JSON nor safetensors"
        assert not head.startswith((b"\x80", b"PK")), f"{file.name} may be a pickle"


class Crash(Exception):
    """Stands for a power failure."""


@pytest.mark.parametrize("module, function, before", [
    (checkpoint, "save_file", 0), (checkpoint, "save_file", 2),
    (atomic_files, "sync", 0), (atomic_files, "sync", 3), (atomic_files, "sync", 4), (atomic_files, "publish", 0),
])
def test_a_crash_while_saving_leaves_the_earlier_checkpoint(
    module: object, function: str, before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, train(make_state(ToyModel()), 1))
    calls, original = iter(range(99)), getattr(module, function)

    def crashing(*args: object) -> None:
        if next(calls) == before:
            raise Crash
        original(*args)

    monkeypatch.setattr(module, function, crashing)
    with pytest.raises(Crash):
        save(tmp_path, train(make_state(ToyModel()), 2), keep=1)
    assert checkpoint_files.latest(tmp_path) == first
    assert restore(first).step == 1


@pytest.mark.parametrize("function", ["remove_folder", "shutil.rmtree"])
def test_a_crash_while_rotating_leaves_the_new_checkpoint(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, train(make_state(ToyModel()), 1))
    removing: list[Path] = []

    def crashing(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            removing.append(path)
            raise Crash

    monkeypatch.setattr(f"dreambooth.utils.atomic_files.{function}", crashing)
    with pytest.raises(Crash):
        save(tmp_path, train(make_state(ToyModel()), 2), keep=1)
    monkeypatch.undo()
    newest = checkpoint_files.latest(tmp_path)
    assert (len(removing), newest) == (1, tmp_path / "step-000002")
    assert restore(newest).step == 2
    atomic_files.remove_leftovers(tmp_path)
    save(tmp_path, train(restore(newest), 3), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000003"], "the next save did not remove leftovers"


def test_all_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = atomic_files.sync, Path.replace
    monkeypatch.setattr(atomic_files, "sync", lambda path: (events.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append(f"rename {to.name}"), replace(path, to)))
    save(tmp_path / "checkpoints", train(make_state(ToyModel()), 1))
    files = ["ema.safetensors", "optimizer.safetensors", "state.json", "trained.safetensors", manifest.NAME,
             ".writing-step-000001"]
    assert events == [*(f"sync {name}" for name in files), "rename step-000001", "sync checkpoints"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no state", "half a state"])
def test_damage_is_detected_and_reported(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = make_state(ToyModel())
    first, second = (save(tmp_path, train(state, step)) for step in (1, 2))
    weights, numbers = second / "trained.safetensors", second / "state.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "half a state":
        numbers.write_text(numbers.read_text()[:40])
    else:
        (weights if damage == "gone" else numbers).unlink()
    assert checkpoint_files.latest(tmp_path) == first
    assert "step-000002 is damaged and is skipped" in caplog.text


def test_a_damaged_checkpoint_does_not_count_in_rotation(tmp_path: Path) -> None:
    """Steps 1 and 4 exist and 4 is damaged. Training continues from 1 and saves 2."""
    save(tmp_path, train(make_state(ToyModel()), 1))
    (save(tmp_path, train(make_state(ToyModel()), 4)) / "ema.safetensors").write_bytes(b"cut")
    save(tmp_path, train(make_state(ToyModel()), 2), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000002"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    state = train(make_state(ToyModel()), 2)
    (save(tmp_path, state) / "ema.safetensors").write_bytes(b"cut")
    assert restore(save(tmp_path, state)).step == 2


@pytest.mark.parametrize("damage", [b"", b"cut", b"\0" * 600])
def test_an_unreadable_checkpoint_is_a_user_error(damage: bytes, tmp_path: Path) -> None:
    """Of an earlier version, which has no checksums."""
    path = save(tmp_path, train(make_state(ToyModel()), 1))
    (path / "trained.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match=r"checkpoint\.resume=never"):
        restore(path)


def test_a_checkpoint_of_other_shapes_is_a_user_error(tmp_path: Path) -> None:
    """The same names with other sizes, as in Stable Diffusion 1.5 and 2.1."""
    path, model = save(tmp_path, train(make_state(ToyModel()), 1)), ToyModel()
    model.unet = torch.nn.Conv2d(1, 2, 3, padding=1, dtype=torch.float64)
    other = make_state(model)
    with pytest.raises(UserError, match="2 weights of step-000001 do not match this model"):
        checkpoint.restore(path, other, other.model, Engine().scaler)


def test_the_safetensors_error_of_a_full_disk_is_handled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk safetensors raises SafetensorError, which is not an OSError (observed on a full tmpfs)."""
    def full(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    first = save(tmp_path, train(make_state(ToyModel()), 1))
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DoesNotFit, match="No space left") as caught:
        save(tmp_path, train(make_state(ToyModel()), 2), keep=1)
    assert caught.value.exit_code == 3
    assert checkpoint_files.latest(tmp_path) == first


NUMBERS = st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype), st.lists(st.integers(0, 255), max_size=6),
    st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.int64]))
ENTRIES = st.dictionaries(st.from_regex(r"[a-z_.]{1,9}", fullmatch=True), NUMBERS | TENSORS, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 300), ENTRIES, max_size=4))
def test_any_optimizer_state_is_saved_and_loaded(entries: dict[int, dict[str, object]]) -> None:
    """Includes 8-bit tensors of bitsandbytes, plain numbers, and steps that are numbers or tensors."""
    groups = [{"lr": 0.1, "betas": [0.9, 0.999], "params": list(entries)}]
    tensors, rest = checkpoint._flatten({"state": entries, "param_groups": groups})
    loaded = checkpoint._unflatten(tensors, json.loads(json.dumps(rest)))
    assert loaded["param_groups"] == groups
    assert loaded["state"].keys() == entries.keys()
    for index, values in entries.items():
        assert loaded["state"][index].keys() == values.keys()
        for name, value in values.items():
            restored = loaded["state"][index][name]
            assert type(restored) is type(value)
            if isinstance(value, torch.Tensor):
                assert restored.dtype == value.dtype
                assert restored.equal(value)
            else:
                assert restored == value


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep/result.json"
    atomic_files.write_json(path, {"a": 1})
    with pytest.raises(Crash), atomic_files.write_file(path) as temporary:
        temporary.write_text("half")
        raise Crash
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_two_pods_write_one_file_through_separate_temporary_files(tmp_path: Path) -> None:
    """Process ids are often equal in containers."""
    path = tmp_path / "a"
    with atomic_files.write_file(path) as first:
        first.write_text("first")
        with atomic_files.write_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second" and first.is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"] and path.read_text() == "first"


def test_a_folder_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_files.write_folder(path) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(Crash), atomic_files.write_folder(path) as temporary:
        (temporary / "new").write_text("half")
        raise Crash
    assert [entry.name for entry in path.iterdir()] == ["old"]
    with atomic_files.write_folder(path) as temporary:
        (temporary / "new").write_text("2")
    assert [entry.name for entry in path.iterdir()] == ["new"], "the old contents were not replaced"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
