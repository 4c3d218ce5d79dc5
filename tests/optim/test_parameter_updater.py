"""Half-precision weights stepped in pieces give the same numbers as weights stepped as a whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth.config.enums import OptimizerKind, Rounding, Weights
from dreambooth.config.schema import Memory
from dreambooth.optim import parameter_updater
from dreambooth.optim.optimizers import WHOLE
from dreambooth.optim.per_parameter import PerParameterOptimizer
from dreambooth.runtime.engine import Engine
from dreambooth.training import checkpoint
from dreambooth.training.step import TrainState
from tests.support.levers import (
    BF16,
    KINDS,
    Mixed,
    assert_equal,
    autocast,
    build_state,
    factory_for,
    save_checkpoint,
    train,
)

SEPARABLE = [kind for kind in KINDS if kind not in WHOLE and kind.allows_half_weights]


class WideLayer(Mixed):
    """A linear layer of 9216 weights: two pieces of 18 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.linear = nn.Embedding(10, 128), nn.Linear(128, 72)
        self.blocks = nn.ModuleList([self.linear])


def build_half_state(kind: OptimizerKind, rounding: Rounding = Rounding.kahan, in_backward: bool = True) -> TrainState:
    memory = Memory(weights=Weights.half, rounding=rounding, optimizer_in_backward=in_backward)
    return build_state(memory, factory_for(kind), BF16, kind=WideLayer)


def split_weights(state: TrainState) -> dict[str, int]:
    """The number of pieces by weight."""
    assert isinstance(state.optimizer, PerParameterOptimizer)
    return {one.name: len(one.spans) for one in state.optimizer.updaters if len(one.spans) > 1}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_updater, "PIECE_SIZE", 8192)


@pytest.mark.parametrize("kind", SEPARABLE)
def test_pieces_give_the_numbers_of_the_whole(kind: OptimizerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_half_state(kind)
    monkeypatch.setattr(parameter_updater, "PIECE_SIZE", 8192)
    pieces = build_half_state(kind)
    assert split_weights(pieces) == {"linear.weight": 2}
    train(whole, engine=autocast()), train(pieces, engine=autocast())
    assert_equal(whole, pieces)


@pytest.mark.parametrize("rounding", Rounding)
def test_a_run_in_pieces_resumes_bit_for_bit(rounding: Rounding, small_pieces: None, tmp_path: Path) -> None:
    uninterrupted, stopped, resumed = (build_half_state(OptimizerKind.adamw8bit, rounding) for _ in range(3))
    train(uninterrupted, 6, autocast(), 0.05), train(stopped, 2, autocast(), 0.05)
    checkpoint.restore(save_checkpoint(stopped, tmp_path), resumed, resumed.model, Engine().scaler)
    train(resumed, 6, autocast(), 0.05)
    assert_equal(uninterrupted, resumed)


@pytest.mark.usefixtures("small_pieces")
def test_pieces_step_equally_in_the_backward_pass_and_after_it() -> None:
    one, other = (build_half_state(OptimizerKind.adamw, Rounding.stochastic, flag) for flag in (False, True))
    train(one, engine=autocast(), limit=0.05), train(other, engine=autocast(), limit=0.05)
    assert_equal(one, other)


@pytest.mark.usefixtures("small_pieces")
def test_pieces_are_rounded_with_random_numbers_of_their_own() -> None:
    """The step has the same size everywhere: with equal random numbers the pieces would end up equal."""
    state = build_half_state(OptimizerKind.adamw, Rounding.stochastic)
    assert isinstance(state.optimizer, PerParameterOptimizer)
    [linear] = [one for one in state.optimizer.updaters if one.name == "linear.weight"]
    linear.parameter.data.fill_(1.0)
    linear.parameter.grad = torch.ones_like(linear.parameter)
    linear.step(Tensor.float, 1e-3, 0)
    first, second = linear.parameter.detach().view(-1).chunk(2)
    assert 0 < int((first < 1).sum()) < first.numel()
    assert not first.equal(second)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", WHOLE)
def test_some_optimizers_see_whole_matrices(kind: OptimizerKind) -> None:
    state = build_half_state(kind, Rounding.stochastic)
    train(state, 1, engine=autocast())
    assert split_weights(state) == {}


def test_only_one_piece_is_in_fp32_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_updater, "PIECE_SIZE", 8192)
    state, sizes = build_half_state(OptimizerKind.adamw, Rounding.stochastic), []
    optimizer_under_test: Any = state.optimizer
    for one in optimizer_under_test.updaters:
        for optimizer in one.optimizers:
            optimizer.register_step_pre_hook(lambda o, *_: sizes.append(o.param_groups[0]["params"][0].numel()))
    train(state, 1, engine=autocast())
    assert max(sizes) == 4608


def test_embeddings_are_half_and_return_fp32() -> None:
    model: Any = build_half_state(OptimizerKind.adamw).model
    assert model.text_encoder.weight.dtype is BF16
    assert model.text_encoder(torch.tensor([1])).dtype is torch.float32
