"""The modelled optimizer allocates the same state as the real optimizers, byte for byte."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dreambooth.config.enums import OptimizerKind
from dreambooth.planner.optimizer_memory import CODEBOOK_BYTES, ModelledOptimizer
from tests.support.levers import factory_for


def _state_bytes(optimizer: torch.optim.Optimizer, without: tuple[str, ...] = ()) -> int:
    tensors = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
               for state in optimizer.state.values() for name, tensor in state.items()
               if isinstance(tensor, torch.Tensor) and name not in without}
    return sum(tensors.values())


def _after_one_step(make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape)) for shape in ((4095,), (4096,), (300, 70), (8, 4, 3, 3), (1,))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make_optimizer(parameters)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("form", ["fused", "foreach", "single"])
def test_adamw_has_the_state_of_pytorchs_adamw(form: str) -> None:
    real = _after_one_step(lambda p: torch.optim.AdamW(p, fused=form == "fused", foreach=form == "foreach"))
    modelled = _after_one_step(lambda p: ModelledOptimizer(p, OptimizerKind.adamw, form=form))
    assert _state_bytes(modelled) == _state_bytes(real)


def test_adamw8bit_has_the_state_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    real = _after_one_step(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3))
    modelled = _after_one_step(lambda p: ModelledOptimizer(p, OptimizerKind.adamw8bit))
    assert _state_bytes(modelled) == _state_bytes(real, without=("qmap1", "qmap2"))
    assert _state_bytes(real) - _state_bytes(modelled) in (0, CODEBOOK_BYTES)


NEW = [OptimizerKind.prodigy, OptimizerKind.schedule_free, OptimizerKind.lion, OptimizerKind.came,
       OptimizerKind.ademamix8bit, OptimizerKind.muon]


@pytest.mark.parametrize("kind", NEW)
def test_an_optimizer_has_the_state_of_the_one_that_a_run_uses(kind: OptimizerKind) -> None:
    def mark(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        parameters[2].is_hidden_matrix = True  # type: ignore[attr-defined]
        return parameters

    real = _after_one_step(lambda p: factory_for(kind)(mark(p)))
    modelled = _after_one_step(lambda p: ModelledOptimizer(mark(p), kind))
    assert _state_bytes(modelled) == _state_bytes(real, without=("qmap1", "qmap2"))


def test_muon_is_rehearsed_with_its_matrix_products() -> None:
    """Newton-Schulz for a matrix of a x b, a < b: five times 2 a a b + 2 a a a + 2 a a b operations."""
    matrix = nn.Parameter(torch.zeros(30, 70))
    matrix.is_hidden_matrix, matrix.grad = True, torch.zeros(30, 70)  # type: ignore[attr-defined]
    with FlopCounterMode(display=False) as counter:
        ModelledOptimizer([matrix], OptimizerKind.muon).step()
    assert counter.get_total_flops() == 5 * (4 * 30 * 30 * 70 + 2 * 30**3)


def test_adafactor_has_the_state_of_transformers_adafactor() -> None:
    from transformers.optimization import Adafactor

    real = _after_one_step(lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False))
    modelled = _after_one_step(lambda p: ModelledOptimizer(p, OptimizerKind.adafactor))
    assert _state_bytes(modelled) == _state_bytes(real)
