"""Each memory lever against the plain run: the same final weights, bit for bit where the mathematics is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth.config.enums import OptimizerKind, Rounding, Weights
from dreambooth.config.schema import Memory
from dreambooth.optim import memory_levers
from dreambooth.optim.ema import Ema, swap_weights
from dreambooth.optim.stochastic_rounding import HALF_FORMATS, round_stochastically
from dreambooth.optim.streaming_optimizer import StreamingOptimizer
from dreambooth.runtime.engine import Engine
from dreambooth.training import checkpoint
from dreambooth.training.step import Objective, TrainState, train_step
from tests.support.levers import (
    BF16,
    KINDS,
    assert_equal,
    autocast,
    build_state,
    factory_for,
    save_checkpoint,
    toy_batches,
    train,
)
from tests.support.toy_model import ToyModel, make_batches, make_schedule

LEVERS = {name: Memory(**{name: True}) for name in ("optimizer_in_backward", "offload_optimizer")}
COMBINATIONS = [(lever, kind) for lever in LEVERS for kind in KINDS
                if kind.steps_each_weight_alone or lever == "offload_optimizer"]


@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("lever, kind", COMBINATIONS)
def test_a_lever_gives_the_plain_weights_bit_for_bit(lever: str, kind: OptimizerKind, limit: float | None) -> None:
    one, other = build_state(Memory(), factory_for(kind)), build_state(LEVERS[lever], factory_for(kind))
    plain_infos, infos = train(one, limit=limit), train(other, limit=limit)
    assert [i.numbers for i in infos] == [i.numbers for i in plain_infos]
    assert limit is None or infos[0].numbers["grad_norm"] > limit, "nothing was clipped, so the test shows nothing"
    assert_equal(one, other)


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_gives_the_plain_weights_under_autocast(lever: str) -> None:
    one, other = build_state(Memory()), build_state(LEVERS[lever], half=BF16)
    train(one, engine=autocast()), train(other, engine=autocast())
    assert_equal(one, other)


def test_the_autocast_cache_changes_no_number() -> None:
    one, other = build_state(Memory()), build_state(Memory())
    train(one, engine=autocast()), train(other, engine=autocast(cache=False))
    assert_equal(one, other)


def test_in_backward_only_one_gradient_exists_at_a_time() -> None:
    state = build_state(LEVERS["optimizer_in_backward"])
    existing: list[int] = []
    for p in state.model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: existing.append(sum(q.grad is not None for q in state.model.parameters())))
    train(state, 1, limit=1.0)
    assert max(existing) == 1
    assert len(existing) == 2 * len(list(state.model.parameters())), "a clipped step takes two passes"


def test_offloading_leaves_half_weights_and_no_gradient_on_the_device() -> None:
    state = build_state(LEVERS["offload_optimizer"], half=BF16)
    train(state, 1, engine=autocast())
    model: Any = state.model
    assert model.unet.weight.dtype is model.linear.bias.dtype is BF16
    assert model.norm.weight.dtype is model.text_encoder.weight.dtype is torch.float32
    assert all(p.grad is None for p in model.parameters())
    assert all(w.dtype is torch.float32 for w in state.weights(model).values())


def test_offloaded_gradients_of_micro_batches_add_up() -> None:
    one, other = build_state(Memory()), build_state(LEVERS["offload_optimizer"])
    for state in (one, other):
        train_step(state, toy_batches(0) + toy_batches(1), Objective(make_schedule()), Engine(), 0.05)
    assert_equal(one, other)


# -- loss scaling -------------------------------------------------------------------------------------------------

def engine_with_scaler() -> Engine:
    """An engine with a loss scaler. `skipped_steps` makes a gradient overflow at step 1."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    return Engine(backward=lambda loss: scaler.scale(loss).backward(), scaler=scaler)


def skipped_steps(state: TrainState, engine: Engine, limit: float | None) -> list[bool]:
    """Train steps 0 to 3; at step 1 the gradient of one weight, the last to be computed, is infinite.

    Returns whether each step was skipped.
    """
    skipped = []
    for step in range(4):
        [batch] = toy_batches(step)
        handle = state.model.text_encoder.weight.register_hook(  # type: ignore[union-attr]
            lambda g, step=step: torch.full_like(g, float("inf")) if step == 1 else g)
        skipped.append(train_step(state, [batch], Objective(make_schedule()), engine, limit).skipped)
        handle.remove()
    return skipped


@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("lever", LEVERS)
def test_under_loss_scaling_a_skipped_step_changes_nothing(lever: str, limit: float | None) -> None:
    one, other = build_state(Memory()), build_state(LEVERS[lever])
    engine, other_engine = engine_with_scaler(), engine_with_scaler()
    assert skipped_steps(one, engine, limit) == skipped_steps(other, other_engine, limit) == [False, True, False, False]
    assert_equal(one, other)
    assert engine.scaler.state_dict() == other_engine.scaler.state_dict()
    assert (other.skipped, other.lr_scheduler.last_epoch) == (1, 3)


def test_offloaded_gradients_are_not_unscaled_by_the_scaler() -> None:
    """GradScaler copies its scale from a GPU to the host with non_blocking=True, and the host does not wait for it."""
    state, engine = build_state(LEVERS["offload_optimizer"]), engine_with_scaler()
    unscaled: list[Tensor] = []
    unscale = engine.scaler.unscale_

    def recording(optimizer: torch.optim.Optimizer) -> None:
        unscaled.extend(p for group in optimizer.param_groups for p in group["params"])
        unscale(optimizer)

    engine.scaler.unscale_ = recording  # type: ignore[method-assign]
    train(state, 1, engine=engine, limit=1.0)
    masters = state.weights(state.model).values()
    assert unscaled and not any(p is master for p in unscaled for master in masters)


@pytest.mark.parametrize("top", [2.0**126, 2.0**8])
@pytest.mark.parametrize("lever", LEVERS)
def test_a_scale_that_grows_between_the_passes_changes_nothing(lever: str, top: float) -> None:
    """The scale doubles after each good step. From 2**126 on, a doubled scale would overflow in the second pass."""
    def engine() -> Engine:
        scaler = torch.amp.GradScaler("cpu", init_scale=top, growth_interval=1)
        return Engine(backward=lambda loss: scaler.scale(loss).backward(), scaler=scaler)

    one, other, first, second = build_state(Memory()), build_state(LEVERS[lever]), engine(), engine()
    plain_infos, infos = train(one, engine=first, limit=0.05), train(other, engine=second, limit=0.05)
    assert [info.skipped for info in infos] == [info.skipped for info in plain_infos]
    assert first.scaler.state_dict() == second.scaler.state_dict()
    assert_equal(one, other)


# -- split prior pass ---------------------------------------------------------------------------------------------

def gradients(split: bool, weight: float) -> list[Tensor]:
    torch.manual_seed(0)
    model = ToyModel()
    recorded: list[Tensor] = []

    class RecordingSGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            recorded.extend(p.grad.clone() for p in model.parameters())  # type: ignore[union-attr]

    optimizer = RecordingSGD(model.parameters(), lr=1.0)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    batches = make_batches()(0) + make_batches()(1)
    train_step(state, batches, Objective(make_schedule(), weight, split_prior=split), Engine(), None)
    return recorded


def test_the_split_prior_pass_gives_the_same_gradient() -> None:
    for one, other in zip(gradients(False, 0.7), gradients(True, 0.7), strict=True):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-15)


def test_the_split_prior_pass_has_half_the_rows_per_forward() -> None:
    state, rows = build_state(Memory()), []
    state.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    train(state, 1, split=True)
    assert rows == [2, 2]


# -- EMA ----------------------------------------------------------------------------------------------------------

def test_an_ema_every_k_steps_uses_the_decay_of_all_k() -> None:
    model = nn.Linear(1, 1, bias=False)
    every, third = Ema(model, 0.9999), Ema(model, 0.9999, every=3)
    nn.init.constant_(model.weight, 7.0)  # constant from here on, so both must agree
    for step in range(1, 10):
        every.update(model), third.update(model)
        if step % 3 == 0:
            assert torch.allclose(every.average["weight"], third.average["weight"], rtol=1e-6), step


def test_averages_are_used_with_the_steps_since_their_last_update() -> None:
    model = nn.Linear(1, 1, bias=False)
    every, third = Ema(model, 0.9999), Ema(model, 0.9999, every=3)
    nn.init.constant_(model.weight, 7.0)
    for _ in range(8):
        every.update(model), third.update(model)
        assert torch.allclose(every.average["weight"], third.current(model)["weight"], rtol=1e-6)
    stored = third.average["weight"].clone()
    third.current(model)
    assert third.average["weight"].equal(stored), "the training state depends on when it is sampled"
    third.update(model)
    assert third.current(model) is third.average


# -- half weights -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", HALF_FORMATS)
@pytest.mark.parametrize("value", [1.0 + 2**-12, -3.3, 6e-5, -2.1e-6, 1e-7, 0.0, 70000.0])
def test_stochastic_rounding_is_to_a_neighbour_and_correct_on_average(dtype: torch.dtype, value: float) -> None:
    count = 200_000
    rounded = round_stochastically(torch.full((count,), value), dtype, torch.Generator().manual_seed(0))
    assert len(rounded.unique()) <= 2
    exact = torch.tensor(value)
    near = exact.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    ulp = float((rounded.float() - near).abs().max())
    assert ulp <= max(float(near.abs()) * 2.0 ** (1 - HALF_FORMATS[dtype][0]), 2.0 ** HALF_FORMATS[dtype][1])
    assert float(rounded.double().mean() - near.double()) == pytest.approx(0, abs=5 * ulp / count**0.5 + 1e-12)


@pytest.mark.parametrize("rounding", Rounding)
def test_half_weights_learn_what_rounding_to_nearest_would_lose(rounding: Rounding) -> None:
    model = nn.Linear(64, 64, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = memory_levers.build_training_optimizer(model, lambda p: torch.optim.SGD(p, lr=1.0),
                             Memory(weights=Weights.half, rounding=rounding), BF16, 0)
    assert isinstance(optimizer, StreamingOptimizer)

    def forward_backward() -> Tensor:
        (model.weight.float().sum() * 2**-10).backward()  # a quarter of the distance to the neighbour below 1
        return torch.zeros(3)

    for step in range(64):
        optimizer.update(forward_backward, Engine(), None, step)
    assert float(model.weight.float().mean()) == pytest.approx(1 - 64 * 2**-10, abs=2e-3)


@pytest.mark.parametrize("in_backward", [False, True])
def test_half_weights_step_equally_in_the_backward_pass_and_after_it(in_backward: bool) -> None:
    one, other = (build_state(Memory(weights=Weights.half, rounding=Rounding.stochastic, optimizer_in_backward=flag),
                        half=BF16) for flag in (False, in_backward))
    train(one, engine=autocast(), limit=0.05), train(other, engine=autocast(), limit=0.05)
    assert_equal(one, other)


@pytest.mark.parametrize("rounding", Rounding)
def test_half_weights_stay_near_the_full_ones(rounding: Rounding) -> None:
    """Weights may differ by at most 2 * sum(r) plus n roundings after n steps of Adam.

    |update| <= r = lr / (1 + step) in each step, in both runs. A wrong sign or scale exceeds the bound.
    """
    one = build_state(Memory())
    other = build_state(Memory(weights=Weights.half, rounding=rounding), half=BF16)
    train(one, engine=autocast()), train(other, engine=autocast())
    rates = sum(1e-2 / (1 + step) for step in range(4))
    for name, weight in one.weights(one.model).items():
        bound = 2 * 1.1 * rates + 4 * 2**-7 * float(weight.abs().max())
        assert float((other.weights(other.model)[name].float() - weight).abs().max()) <= bound


# -- resume -------------------------------------------------------------------------------------------------------

RESUMED: dict[str, Callable[[], TrainState]] = {
    **{f"{name} {kind.value}": lambda name=name, kind=kind: build_state(  # type: ignore[misc]
        LEVERS[name], factory_for(kind)) for name, kind in COMBINATIONS},
    **{f"half {rounding.value}": lambda rounding=rounding: build_state(  # type: ignore[misc]
        Memory(weights=Weights.half, rounding=rounding), half=BF16) for rounding in Rounding},
    **{f"plain {kind.value}": lambda kind=kind: build_state(Memory(), factory_for(kind))  # type: ignore[misc]
       for kind in KINDS},
    "ema every 3": lambda: build_state(Memory(), every=3),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_under_a_lever_is_bit_equal(name: str, tmp_path: Path) -> None:
    make, engine = RESUMED[name], autocast() if "half" in name else Engine()
    uninterrupted, stopped, resumed = make(), make(), make()
    train(uninterrupted, 6, engine, 0.05), train(stopped, 2, engine, 0.05)
    path = save_checkpoint(stopped, tmp_path)
    checkpoint.restore(path, resumed, resumed.model, Engine().scaler)
    train(resumed, 6, engine, 0.05)
    assert_equal(uninterrupted, resumed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.steps_each_weight_alone])
def test_a_run_may_resume_under_other_levers(kind: OptimizerKind, tmp_path: Path) -> None:
    uninterrupted, first = build_state(Memory(), factory_for(kind)), build_state(Memory(), factory_for(kind))
    train(uninterrupted, 6), train(first, 2)
    second, third = (build_state(lever, factory_for(kind)) for lever in LEVERS.values())
    checkpoint.restore(save_checkpoint(first, tmp_path), second, second.model, Engine().scaler)
    train(second, 4)
    checkpoint.restore(save_checkpoint(second, tmp_path), third, third.model, Engine().scaler)
    train(third, 6)
    assert_equal(uninterrupted, third)


def test_exact_fp32_weights_can_replace_half_ones() -> None:
    state = build_state(LEVERS["offload_optimizer"], half=BF16)
    train(state, 1, engine=autocast())
    live: Any = state.model
    before = live.unet.weight.clone()
    with swap_weights(live, state.weights(live), exact=True):
        assert live.unet.weight.equal(state.weights(live)["unet.weight"])
        assert live.unet.weight.dtype is torch.float32
    assert live.unet.weight.equal(before)


# -- fake tensors -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lever", [
    *LEVERS.values(), Memory(weights=Weights.half, rounding=Rounding.stochastic, optimizer_in_backward=True),
    Memory(weights=Weights.half, rounding=Rounding.kahan)])
def test_the_step_runs_on_fake_tensors_under_a_lever(lever: Memory) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        state = build_state(lever, lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False), BF16)
        train_step(state, toy_batches(0), Objective(make_schedule()), autocast(), 1.0)
        assert all(isinstance(weight, FakeTensor) for weight in state.weights(state.model).values())
