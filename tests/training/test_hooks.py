"""Hooks: samples after the checkpoint of their step, when a run resumes, and with the whole moving average."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from dreambooth.data.index.file_hashes import open_hashes
from dreambooth.data.index.photo_loader import PhotoLoader
from dreambooth.data.photos import load_photos
from dreambooth.errors import Interrupted
from dreambooth.optim.ema import Ema, swap_weights
from dreambooth.runtime.engine import Engine
from dreambooth.training import best_weights, checkpoint
from dreambooth.training.evaluation_hook import EvaluationHook
from dreambooth.training.hooks import CheckpointHook, SampleHook, swap_in_ema
from dreambooth.training.sample_images import SampleRecorder
from dreambooth.training.step import TrainState
from dreambooth.utils.signals import StopRequest
from tests.data.noise_photos import save_noise
from tests.support.configs import resolve_demo
from tests.support.toy_model import ToyModel, make_state


def sample_hook(step: int, record: Any, every: int | None = 4) -> SampleHook:
    """The hook of a run of 10 steps that has completed `step` steps."""
    recipe = SimpleNamespace(sample=SimpleNamespace(every=every), train=SimpleNamespace(max_train_steps=10))
    state = SimpleNamespace(step=step, averages=lambda model: None, check_finite=lambda model: None,
                            sharded=None)
    setup = SimpleNamespace(state=state, pipeline="pipeline", trained=None,
                            idle=SimpleNamespace(on_device=nullcontext))
    meter = SimpleNamespace(phase=lambda name: nullcontext())
    return SampleHook(SimpleNamespace(record=record), setup, Engine(), meter, recipe, StopRequest())  # type: ignore[arg-type]


@pytest.mark.parametrize("step, every, expected", [
    (0, 4, [0]), (4, 4, [4]), (10, 4, [10]), (5, 4, []), (0, None, []), (4, None, [])])
def test_samples_that_are_due_at_the_resumed_step_are_generated_before_training(
        step: int, every: int | None, expected: list[int]) -> None:
    """A run that was killed between the checkpoint of a step and its samples has no other chance to generate them."""
    recorded: list[int] = []
    sample_hook(step, lambda step, *rest: recorded.append(step), every).before_training()
    assert recorded == expected


def test_a_stop_request_while_samples_are_generated_leaves_the_end_of_the_run_to_the_stop_hook() -> None:
    def record(*_: object) -> None:
        raise Interrupted("SIGTERM: stopped")

    sample_hook(4, record)(SimpleNamespace(step=4))  # type: ignore[arg-type]


def test_pictures_and_files_get_the_moving_average_with_all_steps() -> None:
    """With ema_every=2 and a skipped fp16 step, the third optimizer step is the last one of a run of four."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    each, second = Ema(model, 0.9999), Ema(model, 0.9999, every=2)
    for value in (5.0, 5.0, 9.0):
        nn.init.constant_(model.weight, value)
        each.update(model), second.update(model)
    state = TrainState(model, torch.optim.SGD(model.parameters()), None, second)  # type: ignore[arg-type]
    for exact in (False, True):
        with swap_in_ema(SimpleNamespace(trained=model, state=state), exact):  # type: ignore[arg-type]
            assert torch.allclose(model.weight, each.average["weight"], rtol=1e-6)
    assert model.weight.item() == 9.0


def test_the_contact_sheet_needs_no_file_of_a_photo_after_the_start(tmp_path: Path) -> None:
    photo = save_noise(tmp_path / "photo.png", (64, 64))
    for _ in range(2):  # the second start decodes photos when their pixels are read
        [loaded] = load_photos([photo], "a toy", 64, load=PhotoLoader(tmp_path, saved=True, memory_limit=0))
    tracker: Any = SimpleNamespace(log_image=lambda *_: True)
    recorder = SampleRecorder(replace(resolve_demo(), run_dir=tmp_path / "run"), [loaded], tracker)
    photo.unlink()
    count = len(recorder.prompts) * recorder.spec.images_per_prompt
    recorder._write(recorder.folder / "step-000000", [Image.new("RGB", (64, 64))] * count)
    recorder.record(0, None, Engine(), StopRequest())
    assert recorder.sheet.is_file()
    open_hashes.cache_clear()


def test_the_best_weights_are_saved_without_being_put_into_the_module(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel would no longer sum the gradients of a parameter that had another dtype meanwhile."""
    model = nn.Linear(2, 1).to(torch.bfloat16)
    state = SimpleNamespace(averages=lambda model: Ema(model, 0.9).average, check_finite=lambda model: None,
                            sharded=None)
    saved: list[Any] = []

    def save(folder: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
        saved.append((folder, step, {name: tensor.dtype for name, tensor in weights.items()}, model.weight.dtype))

    monkeypatch.setattr(best_weights, "save", save)
    hook: Any = SimpleNamespace(
        _select_every=2, setup=SimpleNamespace(state=state, trained=model), engine=Engine(), best_folder=tmp_path,
        best_step=lambda step: step, meter=SimpleNamespace(phase=lambda name: nullcontext()))
    EvaluationHook._keep_best(hook, 3)
    assert not saved
    EvaluationHook._keep_best(hook, 4)
    assert saved == [(tmp_path, 4, {"weight": torch.float32, "bias": torch.float32}, torch.bfloat16)]


def test_weights_without_memory_stay_so_when_others_take_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory.fully_shard, a parameter of the ordinary model is a shape alone, which a copy on a CPU would fill."""
    model = nn.Linear(64, 64, bias=False)
    model.weight.data = model.weight.data.new_zeros(1).expand(64, 64)
    copied: list[int] = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *to_: copied.append(self.untyped_storage().nbytes()) or to(
        self, *to_))
    with swap_weights(model, {"weight": torch.ones(64, 64)}):
        assert model.weight.sum() == 64 * 64
        assert copied == [4 * 64 * 64]
    assert model.weight.untyped_storage().nbytes() == 4


def test_a_checkpoint_that_was_loaded_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, state, *rest: saved.append(state.step))
    state = SimpleNamespace(step=4, check_finite=lambda model: None)
    setup: Any = SimpleNamespace(state=state, trained=None)
    recipe: Any = SimpleNamespace(run_dir=tmp_path, checkpoint=SimpleNamespace(keep=1))
    meter: Any = SimpleNamespace(phase=lambda name: nullcontext())
    hook = CheckpointHook(setup, Engine(), meter, recipe, saved_step=4)
    hook.save()
    assert not saved
    state.step = 5
    hook.save(), hook.save()
    assert saved == [5]


def test_a_checkpoint_of_the_same_step_that_could_not_be_loaded_is_replaced(tmp_path: Path) -> None:
    first, second, resumed = (make_state(ToyModel()) for _ in range(3))
    checkpoint.save(tmp_path, first, first.model, Engine().scaler, 1)
    for parameter in second.model.parameters():
        nn.init.constant_(parameter, 0.5)
    path = checkpoint.save(tmp_path, second, second.model, Engine().scaler, 1)
    checkpoint.restore(path, resumed, resumed.model, Engine().scaler)
    assert all(bool((parameter == 0.5).all()) for parameter in resumed.model.parameters() if parameter.requires_grad)
