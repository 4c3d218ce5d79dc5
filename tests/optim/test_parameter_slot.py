"""A half weight stepped in pieces is stepped as a whole one is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth.config.enums import OptimizerKind, Rounding, Weights
from dreambooth.config.schema import Memory
from dreambooth.optim import parameter_slot
from dreambooth.optim.per_parameter import PerParameter
from dreambooth.runtime.engine import Engine
from dreambooth.training import checkpoint
from dreambooth.training.step import TrainState
from tests.support.levers import BF16, KINDS, Mixed, assert_equal, autocast, of, saved, state, train

SEPARABLE = [kind for kind in KINDS if kind is not OptimizerKind.adafactor]


class Wide(Mixed):
    """A linear layer of 9216 weights: two pieces of 18 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.linear = nn.Embedding(10, 128), nn.Linear(128, 72)


def half(kind: OptimizerKind, rounding: Rounding = Rounding.kahan, in_backward: bool = True) -> TrainState:
    return state(Memory(weights=Weights.half, rounding=rounding, optimizer_in_backward=in_backward), of(kind), BF16,
                 kind=Wide)


def slots(found: TrainState) -> dict[str, int]:
    assert isinstance(found.optimizer, PerParameter)
    return {one.name: len(one.spans) for one in found.optimizer.slots if len(one.spans) > 1}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_slot, "PIECE", 8192)


@pytest.mark.parametrize("kind", SEPARABLE)
def test_pieces_give_the_numbers_of_the_whole(kind: OptimizerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = half(kind)
    monkeypatch.setattr(parameter_slot, "PIECE", 8192)
    pieces = half(kind)
    assert slots(pieces) == {"linear.weight": 2}
    train(whole, engine=autocast()), train(pieces, engine=autocast())
    assert_equal(whole, pieces)


@pytest.mark.parametrize("rounding", Rounding)
def test_a_run_in_pieces_resumes_bit_for_bit(rounding: Rounding, small_pieces: None, tmp_path: Path) -> None:
    straight, stopped, again = (half(OptimizerKind.adamw8bit, rounding) for _ in range(3))
    train(straight, 6, autocast(), 0.05), train(stopped, 2, autocast(), 0.05)
    checkpoint.restore(saved(stopped, tmp_path), again, again.model, Engine().scaler)
    train(again, 6, autocast(), 0.05)
    assert_equal(straight, again)


@pytest.mark.usefixtures("small_pieces")
def test_pieces_step_alike_in_the_backward_pass_and_after_it() -> None:
    one, other = (half(OptimizerKind.adamw, Rounding.stochastic, flag) for flag in (False, True))
    train(one, engine=autocast(), limit=0.05), train(other, engine=autocast(), limit=0.05)
    assert_equal(one, other)


@pytest.mark.usefixtures("small_pieces")
def test_pieces_round_by_chances_of_their_own() -> None:
    """One step of the same size everywhere: were the chances of two pieces the same, so would be their weights."""
    found = half(OptimizerKind.adamw, Rounding.stochastic)
    assert isinstance(found.optimizer, PerParameter)
    [one] = [one for one in found.optimizer.slots if one.name == "linear.weight"]
    one.parameter.data.fill_(1.0)
    one.parameter.grad = torch.ones_like(one.parameter)
    one.step(Tensor.float, 1e-3, 0)
    first, second = one.parameter.detach().view(-1).chunk(2)
    assert 0 < int((first < 1).sum()) < first.numel()
    assert not first.equal(second)


@pytest.mark.usefixtures("small_pieces")
def test_adafactor_sees_whole_matrices() -> None:
    assert slots(half(OptimizerKind.adafactor, Rounding.stochastic)) == {}


def test_no_more_than_a_piece_is_wide_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_slot, "PIECE", 8192)
    found, seen = half(OptimizerKind.adamw, Rounding.stochastic), []
    made: Any = found.optimizer
    for one in made.slots:
        for optimizer in one.optimizers:
            optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0].numel()))
    train(found, 1, engine=autocast())
    assert max(seen) == 4608


def test_embeddings_are_half_and_look_up_in_fp32() -> None:
    found: Any = half(OptimizerKind.adamw).model
    assert found.text_encoder.weight.dtype is BF16
    assert found.text_encoder(torch.tensor([1])).dtype is torch.float32
