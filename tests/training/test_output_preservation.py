"""Output preservation: the base model's prediction is the target of the class rows; nothing else of a step changes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreambooth.config.enums import Dtype, MethodKind, PriorKind, Targets
from dreambooth.config.method import Method
from dreambooth.config.schema import Memory
from dreambooth.data.batches import Batch, Batches
from dreambooth.models import families, lora
from dreambooth.models.noise_schedule import DiffusionSchedule
from dreambooth.optim import memory_levers
from dreambooth.runtime.engine import Engine
from dreambooth.training.output_preservation import base_model, with_base_targets
from dreambooth.training.step import Objective, TrainState, train_step
from tests.support.configs import resolve_demo
from tests.support.faults import train
from tests.support.levers import plain_adamw
from tests.support.runs import KILLED, assert_same, losses, the_run
from tests.support.toy_model import make_batches, make_photo_set, make_schedule

FAMILY = families.of_architecture("sd15")
KINDS = [MethodKind.lora, MethodKind.dora]


class Toy(nn.Module):
    """A convolution with an adapter; a prompt is added to its input."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.unet = nn.ModuleDict({"proj_in": nn.Conv2d(1, 1, 3, padding=1)})
        self.recomputed = recomputed

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        text = text.repeat_interleave(len(latents) // len(text), 0)
        run = partial(checkpoint, use_reentrant=False) if self.recomputed and torch.is_grad_enabled() else _call
        result: Tensor = run(self.unet["proj_in"], latents + text.view(-1, 1, 1, 1) / 10)
        return result


def _call(function: Any, *inputs: Tensor) -> Any:
    return function(*inputs)


def toy(kind: MethodKind = MethodKind.lora, trained: bool = True, **more: Any) -> tuple[Toy, Toy]:
    """The base, and the same with an adapter, which is far from where it began if `trained`."""
    torch.manual_seed(0)
    base, model = Toy(), Toy(**more)
    model.load_state_dict(base.state_dict())
    method = Method(kind.value, kind, rank=2, targets=Targets.all)
    lora.inject(model, method, FAMILY.adapter_targets, seed=1, dtype=Dtype.fp32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and trained:
                parameter += 0.3 * torch.randn_like(parameter)
    return base, model


def preserved(batch: int = 2, accumulation: int = 1, masks: bool = False, **more: Any) -> Batches:
    """Batches of five photos. The token of photo i is i, and that of its class caption 9 - i."""
    photo_set = make_photo_set()
    mask = np.full((8, 12), 255, np.uint8)
    mask[:, :6] = 0
    photos = [replace(photo, class_caption=f"class {9 - i}", mask=mask if masks else None)
              for i, photo in enumerate(photo_set.photos)]
    batches = make_batches(batch, accumulation, photo_sets=[replace(photo_set, photos=photos)], **more)
    batches.dtype = torch.float32
    return batches


def schedule() -> DiffusionSchedule:
    return DiffusionSchedule(make_schedule().alphas_cumprod.float(), "epsilon")


def objective(model: nn.Module, **more: Any) -> Objective:
    recipe = resolve_demo(method__kind=MethodKind.lora, prior__kind=PriorKind.output)
    return Objective(schedule(), 0.5, base_model=base_model(model, recipe), **more)


def state_of(model: nn.Module, memory: Memory | None = None) -> TrainState:
    optimizer = memory_levers.build_training_optimizer(model, plain_adamw, memory or Memory(), torch.float32, seed=5)
    return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))


def gradients(batches: list[Batch], **more: Any) -> list[Tensor]:
    """The gradients of the adapter in a step."""
    _, model = toy(recomputed=more.pop("recomputed", False))
    kept: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: kept.append(p))  # type: ignore[no-untyped-call]
    state = state_of(model)
    state.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    train_step(state, batches, objective(model, **more), Engine(), None)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_class_rows_are_the_photos_rows_with_class_captions_and_without_masks() -> None:
    batch = preserved(batch=3, masks=True)(0)[0]
    instance, rows = batch.halves()
    assert batch.num_instances == len(rows.timesteps) == 3 and batch.with_prior
    for name in ("latents", "noise", "timesteps"):
        assert getattr(rows, name).equal(getattr(instance, name))
    assert rows.text.equal(9 - instance.text)
    assert rows.mask is not None and instance.mask is not None
    assert rows.mask.min() == 1 > instance.mask.min()


def test_a_step_with_one_prompt_encodes_one_class_caption() -> None:
    batches = preserved(share_prompts=True)
    [photo_set] = batches.photo_sets
    photos = [replace(photo, caption="caption 1", class_caption="class 2") for photo in photo_set.photos]
    alike = replace(batches, photo_sets=[replace(photo_set, photos=photos)])
    assert alike(0)[0].text.tolist() == [[1], [2]]
    assert batches(0)[0].text.shape == (4, 1), "captions differ, and each row has its own"


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_of_class_rows_is_what_the_base_predicts(kind: MethodKind) -> None:
    base, model = toy(kind)
    batch = preserved(batch=3)(0)[0]
    predict = objective(model).base_model
    assert predict is not None
    [ready] = with_base_targets([batch], predict, schedule(), Engine())
    noisy = schedule().add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        wanted, adapted = (each(noisy, batch.timesteps, batch.text) for each in (base, model))
    assert ready.target is not None and not ready.target.requires_grad
    assert ready.target[3:].equal(wanted[3:]) and not torch.allclose(wanted, adapted)
    assert ready.target[:3].equal(batch.noise[:3]), "photos are trained to their noise, as always"
    assert model(noisy, batch.timesteps, batch.text).equal(adapted), "the adapter is back"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == (2 if kind is MethodKind.lora else 3)


def test_an_untrained_adapter_has_no_prior_loss_and_a_trained_one_has() -> None:
    _, model = toy(trained=False)
    state, target = state_of(model), objective(model)
    losses_prior = [train_step(state, preserved()(step), target, Engine(), 1.0).numbers["loss_prior"]
                    for step in range(3)]
    assert losses_prior[0] == 0 < min(losses_prior[1:])


@pytest.mark.parametrize("how", ["split", "accumulated", "recomputed"])
def test_the_gradient_is_that_of_one_pass(how: str) -> None:
    """Sums of 3 x 64 fp32 terms in another order; the gradients are about 1."""
    whole = gradients(preserved(batch=4)(0))
    other = {"split": lambda: gradients(preserved(batch=4)(0), split_prior=True),
             "accumulated": lambda: gradients(preserved(batch=1, accumulation=4)(0)),
             "recomputed": lambda: gradients(preserved(batch=4)(0), recomputed=True)}[how]()
    assert len(whole) == len(other) == 2 and all(float(gradient.norm()) > 1e-3 for gradient in whole)
    for one, two in zip(whole, other, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_targets_are_predicted_once_in_a_step_with_two_backward_passes() -> None:
    _, model = toy()
    calls = []
    target = objective(model)

    def counted(*inputs: Tensor) -> Tensor:
        calls.append(inputs)
        assert target.base_model is not None
        return target.base_model(*inputs)

    state = state_of(model, Memory(optimizer_in_backward=True))
    train_step(state, preserved()(0), replace(target, base_model=counted), Engine(), 0.01)
    assert len(calls) == 1


def test_a_failed_prediction_leaves_the_adapter_enabled() -> None:
    _, model = toy()
    predict = objective(model).base_model
    assert predict is not None
    with pytest.raises(TypeError):
        predict(torch.zeros(1, 1, 8, 8))
    assert not any(layer.disable_adapters for _, layer in lora.layers(model))


@pytest.mark.slow
def test_a_run_makes_no_class_images_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    words = ["method=lora", "prior.kind=output", "sample.every=null"]
    assert train(tmp_path / "whole", *words) == 0
    assert not (tmp_path / "whole/class_images").exists()
    assert train(tmp_path / "killed", *words, fault="checkpoint_rename") == KILLED
    assert train(tmp_path / "killed", *words) == 0
    whole, killed = the_run(tmp_path / "whole"), the_run(tmp_path / "killed")
    assert_same(killed, whole, except_for="losses")
    assert len(losses(whole)) == 8


@pytest.mark.slow
def test_flow_matching_and_a_base_of_8_bits_are_preserved_too(tmp_path: Path) -> None:
    words = ["model=tiny_flow", "method=lora", "prior.kind=output", "sample.every=null", "precision=bf16",
             "method.base_weights=int8", "memory.gradient_checkpointing=true", "memory.swap_blocks=2",
             "train.max_train_steps=2", "dataset.buckets=true"]
    assert train(tmp_path, *words, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
