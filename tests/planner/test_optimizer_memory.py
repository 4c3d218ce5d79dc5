"""The modelled optimizer allocates the same state as the real optimizers, byte for byte."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dreambooth.config.enums import OptimizerKind
from dreambooth.planner.optimizer_memory import CODEBOOK_BYTES, ModelledOptimizer


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


def test_adafactor_has_the_state_of_transformers_adafactor() -> None:
    from transformers.optimization import Adafactor

    real = _after_one_step(lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False))
    modelled = _after_one_step(lambda p: ModelledOptimizer(p, OptimizerKind.adafactor))
    assert _state_bytes(modelled) == _state_bytes(real)
