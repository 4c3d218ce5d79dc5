"""Output preservation: class rows are states of pictures that the base draws, and its predictions are their targets."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from dreambooth.training.output_preservation import OutputPreservation, base_model
from dreambooth.training.step import Objective, TrainState, train_step
from tests.support.configs import demo_recipe
from tests.support.faults import train
from tests.support.levers import plain_adamw
from tests.support.runs import KILLED, assert_same, losses, the_run
from tests.support.toy_model import make_batches, make_photo_set, make_schedule

FAMILY = families.of_architecture("sd15")
KINDS = [kind for kind in MethodKind if kind is not MethodKind.full]


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


def photos(batch: int = 4, accumulation: int = 1, **more: Any) -> Batches:
    """Batches of photos without class images."""
    batches = make_batches(batch, accumulation, photo_sets=[make_photo_set()], **more)
    batches.dtype = torch.float32
    return batches


def schedule() -> DiffusionSchedule:
    return DiffusionSchedule(make_schedule().alphas_cumprod.float(), "epsilon")


def preservation(model: nn.Module, rows: int = 2, micro_batches: int = 1, classes: int = 1, **more: Any,
                 ) -> OutputPreservation:
    texts = [torch.tensor([[6 + number]]) for number in range(classes)]
    return OutputPreservation(base_model(model), schedule(), texts, (1, 8, 8), rows, micro_batches, 3,
                              torch.device("cpu"), **{"steps": 4, **more})


def objective(model: nn.Module, split: bool = False, **more: Any) -> Objective:
    return Objective(schedule(), 0.5, split_prior=split, preservation=preservation(model, **more))


def state_of(model: nn.Module, memory: Memory | None = None) -> TrainState:
    optimizer = memory_levers.build_training_optimizer(model, plain_adamw, memory or Memory(), torch.float32, seed=5)
    return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))


def gradients(batches: Batches, recomputed: bool = False, **more: Any) -> list[Tensor]:
    """The gradients of the adapter in a step."""
    _, model = toy(recomputed=recomputed)
    state = state_of(model)
    state.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    train_step(state, batches(0), objective(model, **more), Engine(), None)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_of_class_rows_is_what_the_base_predicts(kind: MethodKind) -> None:
    base, model = toy(kind)
    batch = photos()(0)[0]
    [ready] = preservation(model)([batch], 0, Engine())
    assert ready.noisy is not None and ready.target is not None and not ready.target.requires_grad
    text = torch.tensor([[6]])
    with torch.no_grad():
        wanted, adapted = (each(ready.noisy[4:], ready.timesteps[4:], text) for each in (base, model))
    assert ready.target[4:].equal(wanted) and not torch.allclose(wanted, adapted)
    assert ready.text[4:].tolist() == [[6], [6]] and ready.text[:4].equal(batch.text)
    assert ready.target[:4].equal(batch.noise), "photos are trained to their noise, as always"
    assert ready.noisy[:4].equal(schedule().add_noise(batch.latents, batch.noise, batch.timesteps))
    with torch.no_grad():
        assert model(ready.noisy[4:], ready.timesteps[4:], text).equal(adapted), "the adapter is back"
    assert any(parameter.requires_grad for parameter in model.parameters()), "and it trains"


def test_each_row_draws_its_pictures_by_the_samplers_steps() -> None:
    """DDIM of diffusers on the same timesteps, with the same predictions."""
    from diffusers import DDIMScheduler

    base, model = toy()
    draw, engine = preservation(model, rows=1), Engine()
    rows = [draw(photos(1)(step), step, engine)[0].halves()[1] for step in range(9)]
    times = [int(row.timesteps) for row in rows]
    assert times[0] == times[4] == times[8] == 999 and times[:4] == sorted(times[:4], reverse=True)
    assert times[1:4] != times[5:8], "each picture has other timesteps"
    assert not rows[0].latents.equal(rows[4].latents), "and other noise"
    theirs = DDIMScheduler(clip_sample=False)
    theirs.alphas_cumprod, theirs.num_inference_steps = schedule().alphas_cumprod, 1000
    state = rows[0].latents
    for now, later in pairwise(rows[:4]):
        theirs.config.num_train_timesteps = 1000 * (int(now.timesteps) - int(later.timesteps))
        with torch.no_grad():
            prediction = base(state, now.timesteps, torch.tensor([[6]]))
        state = theirs.step(prediction, int(now.timesteps), state).prev_sample
        assert torch.allclose(later.latents, state, rtol=1e-4, atol=1e-5)


def test_rows_are_at_different_steps_and_share_the_classes() -> None:
    _, model = toy()
    draw = preservation(model, rows=4, classes=2)
    [ready] = draw(photos()(0), 0, Engine())
    times = ready.timesteps[4:].tolist()
    assert times[0] == 999 and times == sorted(times, reverse=True) and len(set(times)) == 4
    assert ready.text[4:].flatten().tolist() == [6, 7, 6, 7]
    [later] = draw(photos()(1), 1, Engine())
    assert later.text[4:].flatten().tolist() == [6, 7, 6, 6], "row 3 began its next picture, of the other class"


def test_with_one_photo_every_second_step_has_a_class_row_of_twice_the_weight() -> None:
    recipe = demo_recipe(train__train_batch_size=1, method__kind=MethodKind.lora, prior__kind=PriorKind.output)
    assert (recipe.class_rows, recipe.class_row_interval) == (1, 2)
    assert Objective.of(recipe, schedule()).prior_loss_weight == 2 * recipe.prior.prior_loss_weight
    _, model = toy()
    always, draw = preservation(model, rows=1), preservation(model, rows=1, interval=2)
    for step in range(6):
        [ready] = draw(photos(1)(step), step, Engine())
        assert ready.with_prior == (step % 2 == 0)
        if ready.with_prior:
            [wanted] = always(photos(1)(step // 2), step // 2, Engine())
            assert ready.latents[1:].equal(wanted.latents[1:])


@pytest.mark.parametrize("step", [0, 1, 7, 8])
@pytest.mark.parametrize("interval", [1, 2])
def test_the_states_of_a_step_do_not_depend_on_when_the_run_was_resumed(interval: int, step: int) -> None:
    _, model = toy()
    whole, resumed = (preservation(model, interval=interval) for _ in range(2))
    for before in range(step):
        whole(photos()(before), before, Engine())
    one, other = (draw(photos()(step), step, Engine())[0] for draw in (whole, resumed))
    for name in ("noisy", "target", "timesteps") if one.with_prior else ():
        assert getattr(one, name).equal(getattr(other, name)), name


def test_class_rows_do_not_depend_on_how_a_step_is_divided() -> None:
    """Micro-batches and processes number their rows across the whole step."""
    _, model = toy()
    [whole] = preservation(model, rows=4)(photos(8)(5), 5, Engine())
    wanted = whole.halves()[1].latents
    micro = preservation(model, rows=2, micro_batches=2)(photos(4, 2)(5), 5, Engine())
    ranks = [preservation(model, rows=2, rank=rank, world_size=2)(photos(4, world_size=2, rank=rank)(5), 5, Engine())[0]
             for rank in (0, 1)]
    for parts in (micro, ranks):
        assert torch.allclose(torch.cat([part.halves()[1].latents for part in parts]), wanted, rtol=1e-5, atol=1e-6)


def test_an_untrained_adapter_has_no_prior_loss_and_a_trained_one_has() -> None:
    _, model = toy(trained=False)
    state, target = state_of(model), objective(model)
    found = [train_step(state, photos()(step), target, Engine(), 1.0).numbers["loss_prior"] for step in range(3)]
    assert found[0] == 0 < min(found[1:])


@pytest.mark.parametrize("how", ["split", "accumulated", "recomputed"])
def test_the_gradient_is_that_of_one_pass(how: str) -> None:
    """Sums of 6 x 64 fp32 terms in another order; the gradients are about 1."""
    whole = gradients(photos(4), rows=2)
    other = {"split": lambda: gradients(photos(4), rows=2, split=True),
             "accumulated": lambda: gradients(photos(2, 2), rows=1, micro_batches=2),
             "recomputed": lambda: gradients(photos(4), rows=2, recomputed=True)}[how]()
    assert len(whole) == len(other) == 2 and all(float(gradient.norm()) > 1e-3 for gradient in whole)
    for one, two in zip(whole, other, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_the_base_predicts_once_in_a_step_with_two_backward_passes() -> None:
    _, model = toy()
    calls = []
    draw = preservation(model, steps=1)

    def counted(*inputs: Tensor) -> Tensor:
        calls.append(inputs)
        return base_model(model)(*inputs)

    target = Objective(schedule(), 0.5, preservation=replace(draw, base=counted))
    train_step(state_of(model, Memory(optimizer_in_backward=True)), photos()(0), target, Engine(), 0.01)
    assert len(calls) == 1


def test_photos_that_share_a_prompt_and_class_rows_are_joined() -> None:
    """Four photos with one prompt and two class rows: each text belongs to two rows."""
    batches = photos(share_prompts=True)
    [photo_set] = batches.photo_sets
    same = [replace(photo, caption="caption 1") for photo in photo_set.photos]
    alike = replace(batches, photo_sets=[replace(photo_set, photos=same)])
    _, model = toy()
    [ready] = preservation(model)(alike(0), 0, Engine())
    assert ready.text.tolist() == [[1], [1], [6]] and ready.num_samples == 6
    assert [half.text.tolist() for half in ready.halves()] == [[[1], [1]], [[6]]]


def test_class_rows_beside_photos_of_a_bucket_have_a_pass_of_their_own() -> None:
    _, model = toy()
    batch: Batch = photos()(0)[0]
    wide = replace(batch, latents=batch.latents.repeat(1, 1, 1, 2), noise=batch.noise.repeat(1, 1, 1, 2))
    [ready] = preservation(model)([wide], 0, Engine())
    assert ready.class_batch is not None and ready.class_batch.target is not None and ready.with_prior


def test_a_failed_prediction_leaves_the_adapter_enabled() -> None:
    _, model = toy()
    with pytest.raises(TypeError):
        base_model(model)(torch.zeros(1, 1, 8, 8))
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
