"""Each lever against the plain run: the same final weights, bit for bit where the mathematics is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth.config.enums import OptimizerKind, Rounding, Weights
from dreambooth.config.schema import Memory
from dreambooth.optim import memory_levers
from dreambooth.optim.ema import Ema, swapped
from dreambooth.optim.stochastic_rounding import FORMATS, stochastic
from dreambooth.optim.streaming_optimizer import Levered
from dreambooth.runtime.engine import Engine
from dreambooth.training import checkpoint
from dreambooth.training.step import Objective, TrainState, train_step
from tests.support.levers import BF16, KINDS, assert_equal, autocast, data, of, saved, state, train
from tests.support.toy_model import Toy, batches, schedule

LEVERS = {name: Memory(**{name: True}) for name in ("optimizer_in_backward", "offload_optimizer")}


@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_gives_the_plain_weights_bit_for_bit(lever: str, kind: OptimizerKind, limit: float | None) -> None:
    one, other = state(Memory(), of(kind)), state(LEVERS[lever], of(kind))
    plain_infos, infos = train(one, limit=limit), train(other, limit=limit)
    assert [i.numbers for i in infos] == [i.numbers for i in plain_infos]
    assert limit is None or infos[0].numbers["grad_norm"] > limit, "nothing was clipped: the test shows nothing"
    assert_equal(one, other)


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_gives_the_plain_weights_under_autocast(lever: str) -> None:
    one, other = state(Memory()), state(LEVERS[lever], half=BF16)
    train(one, engine=autocast()), train(other, engine=autocast())
    assert_equal(one, other)


def test_the_autocast_cache_changes_no_number() -> None:
    one, other = state(Memory()), state(Memory())
    train(one, engine=autocast()), train(other, engine=autocast(cache=False))
    assert_equal(one, other)


def test_in_backward_one_gradient_exists_at_a_time() -> None:
    found = state(LEVERS["optimizer_in_backward"])
    alive: list[int] = []
    for p in found.model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in found.model.parameters())))
    train(found, 1, limit=1.0)
    assert max(alive) == 1
    assert len(alive) == 2 * len(list(found.model.parameters())), "a clipped step has two passes"


def test_offloaded_the_device_holds_half_weights_and_no_gradient() -> None:
    found = state(LEVERS["offload_optimizer"], half=BF16)
    train(found, 1, engine=autocast())
    model: Any = found.model
    assert model.unet.weight.dtype is model.linear.bias.dtype is BF16
    assert model.norm.weight.dtype is model.text_encoder.weight.dtype is torch.float32
    assert all(p.grad is None for p in model.parameters())
    assert all(w.dtype is torch.float32 for w in found.weights(model).values())


def test_offloaded_gradients_of_micro_batches_add_up() -> None:
    one, other = state(Memory()), state(LEVERS["offload_optimizer"])
    for found in (one, other):
        train_step(found, data(0) + data(1), Objective(schedule()), Engine(), 0.05)
    assert_equal(one, other)


# -- loss scaling -------------------------------------------------------------------------------------------------

def scaled() -> Engine:
    """An engine with a loss scaler whose scale overflows at step 1 only (see `overflowing`)."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    return Engine(backward=lambda loss: scaler.scale(loss).backward(), scaler=scaler)


def overflowing(found: TrainState, engine: Engine, limit: float | None) -> list[bool]:
    """Steps 0..3; at step 1 the gradient of one weight, the last to be computed, is infinite."""
    skipped = []
    for step in range(4):
        [batch] = data(step)
        handle = found.model.text_encoder.weight.register_hook(  # type: ignore[union-attr]
            lambda g, step=step: torch.full_like(g, float("inf")) if step == 1 else g)
        skipped.append(train_step(found, [batch], Objective(schedule()), engine, limit).skipped)
        handle.remove()
    return skipped


@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("lever", LEVERS)
def test_under_loss_scaling_a_skipped_step_changes_nothing(lever: str, limit: float | None) -> None:
    one, other, engine, other_engine = state(Memory()), state(LEVERS[lever]), scaled(), scaled()
    assert overflowing(one, engine, limit) == overflowing(other, other_engine, limit) == [False, True, False, False]
    assert_equal(one, other)
    assert engine.scaler.state_dict() == other_engine.scaler.state_dict()
    assert (other.skipped, other.schedule.last_epoch) == (1, 3)


@pytest.mark.parametrize("top", [2.0**126, 2.0**8])
@pytest.mark.parametrize("lever", LEVERS)
def test_a_scale_that_grows_between_the_passes_changes_nothing(lever: str, top: float) -> None:
    """The scale doubles after each good step; from 2**126 on a doubled one would overflow in the second pass."""
    def engine() -> Engine:
        scaler = torch.amp.GradScaler("cpu", init_scale=top, growth_interval=1)
        return Engine(backward=lambda loss: scaler.scale(loss).backward(), scaler=scaler)

    one, other, first, second = state(Memory()), state(LEVERS[lever]), engine(), engine()
    plain_infos, infos = train(one, engine=first, limit=0.05), train(other, engine=second, limit=0.05)
    assert [info.skipped for info in infos] == [info.skipped for info in plain_infos]
    assert first.scaler.state_dict() == second.scaler.state_dict()
    assert_equal(one, other)


# -- split prior pass ---------------------------------------------------------------------------------------------

def gradients(split: bool, weight: float) -> list[Tensor]:
    torch.manual_seed(0)
    model = Toy()
    caught: list[Tensor] = []

    class Catch(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            caught.extend(p.grad.clone() for p in model.parameters())  # type: ignore[union-attr]

    optimizer = Catch(model.parameters(), lr=1.0)
    found = TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    train_step(found, batches()(0) + batches()(1), Objective(schedule(), weight, split_prior=split), Engine(), None)
    return caught


def test_the_split_prior_pass_gives_the_same_gradient() -> None:
    for one, other in zip(gradients(False, 0.7), gradients(True, 0.7), strict=True):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-15)


def test_the_split_prior_pass_holds_half_the_rows_at_a_time() -> None:
    found, rows = state(Memory()), []
    found.model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    train(found, 1, split=True)
    assert rows == [2, 2]


# -- EMA ----------------------------------------------------------------------------------------------------------

def test_an_ema_every_k_steps_uses_the_decay_of_all_k() -> None:
    model = nn.Linear(1, 1, bias=False)
    every, third = Ema(model, 0.9999), Ema(model, 0.9999, every=3)
    nn.init.constant_(model.weight, 7.0)  # and it stays: then both must agree
    for step in range(1, 10):
        every.update(model), third.update(model)
        if step % 3 == 0:
            assert torch.allclose(every.average["weight"], third.average["weight"], rtol=1e-6), step


# -- half weights -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("value", [1.0 + 2**-12, -3.3, 6e-5, -2.1e-6, 1e-7, 0.0, 70000.0])
def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average(dtype: torch.dtype, value: float) -> None:
    count = 200_000
    rounded = stochastic(torch.full((count,), value), dtype, torch.Generator().manual_seed(0))
    assert len(rounded.unique()) <= 2
    exact = torch.tensor(value)
    near = exact.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    ulp = float((rounded.float() - near).abs().max())
    assert ulp <= max(float(near.abs()) * 2.0 ** (1 - FORMATS[dtype][0]), 2.0 ** FORMATS[dtype][1])
    assert float(rounded.double().mean() - near.double()) == pytest.approx(0, abs=5 * ulp / count**0.5 + 1e-12)


@pytest.mark.parametrize("rounding", Rounding)
def test_half_weights_learn_what_rounding_to_nearest_would_lose(rounding: Rounding) -> None:
    model = nn.Linear(64, 64, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = memory_levers.equip(model, lambda p: torch.optim.SGD(p, lr=1.0),
                             Memory(weights=Weights.half, rounding=rounding), BF16, 0)
    assert isinstance(optimizer, Levered)

    def run() -> Tensor:
        (model.weight.float().sum() * 2**-10).backward()  # a quarter of the distance to the neighbour below 1
        return torch.zeros(3)

    for step in range(64):
        optimizer.update(run, Engine(), None, step)
    assert float(model.weight.float().mean()) == pytest.approx(1 - 64 * 2**-10, abs=2e-3)


@pytest.mark.parametrize("in_backward", [False, True])
def test_half_weights_step_alike_in_the_backward_pass_and_after_it(in_backward: bool) -> None:
    one, other = (state(Memory(weights=Weights.half, rounding=Rounding.stochastic, optimizer_in_backward=flag),
                        half=BF16) for flag in (False, in_backward))
    train(one, engine=autocast(), limit=0.05), train(other, engine=autocast(), limit=0.05)
    assert_equal(one, other)


@pytest.mark.parametrize("rounding", Rounding)
def test_half_weights_stay_near_the_full_ones(rounding: Rounding) -> None:
    """After n steps of at most r in Adam, weights differ by what rounding lost and by what that changed in n steps.

    |update| <= r here (lr / (1 + step)), so by at most 2 * sum(r) plus n roundings; a wrong sign or scale exceeds it.
    """
    one = state(Memory())
    other = state(Memory(weights=Weights.half, rounding=rounding), half=BF16)
    train(one, engine=autocast()), train(other, engine=autocast())
    rates = sum(1e-2 / (1 + step) for step in range(4))
    for name, weight in one.weights(one.model).items():
        bound = 2 * 1.1 * rates + 4 * 2**-7 * float(weight.abs().max())
        assert float((other.weights(other.model)[name].float() - weight).abs().max()) <= bound


# -- resume -------------------------------------------------------------------------------------------------------

RESUMED: dict[str, Callable[[], TrainState]] = {
    **{f"{name} {kind.value}": lambda lever=lever, kind=kind: state(lever, of(kind))  # type: ignore[misc]
       for name, lever in LEVERS.items() for kind in KINDS},
    **{f"half {rounding.value}": lambda rounding=rounding: state(  # type: ignore[misc]
        Memory(weights=Weights.half, rounding=rounding), half=BF16) for rounding in Rounding},
    "ema every 3": lambda: state(Memory(), every=3),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_under_a_lever_is_bit_equal(name: str, tmp_path: Path) -> None:
    make, engine = RESUMED[name], autocast() if "half" in name else Engine()
    straight, stopped, again = make(), make(), make()
    train(straight, 6, engine, 0.05), train(stopped, 2, engine, 0.05)
    path = saved(stopped, tmp_path)
    checkpoint.restore(path, again, again.model, Engine().scaler)
    train(again, 6, engine, 0.05)
    assert_equal(straight, again)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_resume_under_other_levers(kind: OptimizerKind, tmp_path: Path) -> None:
    straight, first = state(Memory(), of(kind)), state(Memory(), of(kind))
    train(straight, 6), train(first, 2)
    second, third = (state(lever, of(kind)) for lever in LEVERS.values())
    checkpoint.restore(saved(first, tmp_path), second, second.model, Engine().scaler)
    train(second, 4)
    checkpoint.restore(saved(second, tmp_path), third, third.model, Engine().scaler)
    train(third, 6)
    assert_equal(straight, third)


def test_exact_weights_may_stand_in_for_half_ones() -> None:
    found = state(LEVERS["offload_optimizer"], half=BF16)
    train(found, 1, engine=autocast())
    live: Any = found.model
    before = live.unet.weight.clone()
    with swapped(live, found.weights(live), exact=True):
        assert live.unet.weight.equal(found.weights(live)["unet.weight"])
        assert live.unet.weight.dtype is torch.float32
    assert live.unet.weight.equal(before)


# -- fake tensors -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lever", [
    *LEVERS.values(), Memory(weights=Weights.half, rounding=Rounding.stochastic, optimizer_in_backward=True),
    Memory(weights=Weights.half, rounding=Rounding.kahan)])
def test_the_step_runs_on_fake_tensors_under_a_lever(lever: Memory) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        found = state(lever, lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False), BF16)
        train_step(found, data(0), Objective(schedule()), autocast(), 1.0)
        assert all(isinstance(weight, FakeTensor) for weight in found.weights(found.model).values())
