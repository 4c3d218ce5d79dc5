"""Frozen linear layers in 8 bits: the error of their weights, their output and gradient, and what they keep."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth.config.enums import BaseWeights, Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.models import lora
from dreambooth.models.quantization import FORMATS, QuantisedLinear, quantise

EIGHT_BITS = [BaseWeights.int8, BaseWeights.fp8]


def layer() -> nn.Linear:
    """A layer whose rows have norms from 1e-4 to 1e3, and one row of zeros."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight *= torch.logspace(-4, 3, 32).view(-1, 1)
        linear.weight[5] = 0
    return linear.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", EIGHT_BITS)
def test_the_error_of_a_weight_is_within_the_bound(base: BaseWeights, dtype: torch.dtype) -> None:
    """The bound of QuantisedLinear's docstring."""
    plain = layer().to(dtype)
    quantised = QuantisedLinear(plain, FORMATS[base], dtype)
    exact, found, scale = (value.double() for value in (plain.weight, quantised.weight, quantised.scale))
    half = scale / 2 if base is BaseWeights.int8 else torch.maximum(2**-4 * exact.abs(), 2**-10 * scale)
    roundoff = torch.finfo(dtype).eps / 2
    assert ((found - exact).abs() <= half * (1 + 1e-12) + 2 * roundoff * found.abs()).all()
    assert found[5].abs().max() == 0
    stored = sum(p.nbytes for p in quantised.parameters())
    assert stored == 64 * 32 + (32 + 32) * dtype.itemsize  # weights, scales and bias


@pytest.mark.parametrize("base", EIGHT_BITS)
def test_it_computes_as_a_layer_with_the_rounded_weight_and_keeps_only_the_stored_one(base: BaseWeights) -> None:
    plain = nn.Sequential(layer(), nn.GELU())
    rounded = QuantisedLinear(layer(), FORMATS[base], torch.float32).weight
    quantise(plain, torch.float32, base)
    assert isinstance(plain[0], QuantisedLinear)
    inputs = [torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = plain[0](inputs[0])
    assert {tensor.data_ptr() for tensor in kept} == {plain[0].quantised.data_ptr(), plain[0].scale.data_ptr()}
    expected = F.linear(inputs[1], rounded, layer().bias)
    assert output.equal(expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [MethodKind.lora, MethodKind.dora])
def test_an_adapter_of_a_quantised_layer_starts_as_the_layer_and_trains(kind: MethodKind) -> None:
    """DoRA's norms are those of the dequantised weight."""
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"to_q": layer()})})
    quantise(model, torch.float32, BaseWeights.int8)
    base = model["transformer"]["to_q"]
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = base(inputs)
    lora.inject(model, Method(kind.value, kind, rank=2), dict.fromkeys(Targets, re.compile("to_q")), 0, Dtype.fp32)
    output = model["transformer"]["to_q"](inputs)
    torch.testing.assert_close(output[:, 6:], expected[:, 6:], rtol=1e-5, atol=1e-3)
    output.sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 + (kind is MethodKind.dora)
    assert all(p.dtype is torch.float32 and p.grad is not None for p in trained.values())
