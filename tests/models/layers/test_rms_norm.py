"""RMS norms with a derivative of their own."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear
from torch import Tensor, nn

from dreambooth.config.compose import load
from dreambooth.config.recipe import resolve
from dreambooth.models import loading
from dreambooth.models.adapters.lora_linear import LoraLinear
from dreambooth.models.layers.rms_norm import LeanRMSNorm, use_lean_norms
from tests.support.configs import compose_config


def pair(dtype: torch.dtype = torch.float64, weight_dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module]:
    """Return diffusers' layer, and ours with the same weights."""
    torch.manual_seed(0)
    plain = RMSNorm(24, eps=1e-3)
    with torch.no_grad():
        plain.weight.copy_(torch.rand(24) + 0.5)
    plain.to(weight_dtype or dtype)
    lean = copy.deepcopy(plain)
    use_lean_norms(lean)
    assert type(lean) is LeanRMSNorm and lean.state_dict().keys() == plain.state_dict().keys()
    return plain, lean


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * torch.linspace(-1, 2, output.numel()).view_as(output).to(output.dtype)).sum().backward()
    return output.detach(), x.grad, layer.weight.grad


def test_a_gradient_that_is_not_contiguous() -> None:
    plain, lean = pair()
    x = torch.randn(4, 24, dtype=torch.float64)
    seen = []
    for layer in (plain, lean):
        given = x.clone().requires_grad_()
        layer(given.view(2, 2, 24)).transpose(0, 1).reshape(2, -1).square().sum().backward()
        seen.append((given.grad, layer.weight.grad))
    for expected, found in zip(*seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_output_and_gradients_are_those_of_diffusers(trained: bool) -> None:
    """In fp64, but for diffusers' variance, which is in fp32."""
    plain, lean = pair()
    for layer in (plain, lean):
        layer.weight.requires_grad_(trained)
    x = torch.randn(2, 3, 5, 24, dtype=torch.float64)
    for expected, found in zip(gradients(plain, x), gradients(lean, x), strict=True):
        if expected is None:
            assert found is None and not trained
        else:
            torch.testing.assert_close(found, expected, rtol=3e-7, atol=3e-7)


def test_its_gradient_is_the_derivative() -> None:
    """Finite differences, which need more precision than that of diffusers' variance."""
    _, lean = pair()
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lean(x), x)
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(lean, {"weight": weight}, (x.detach(),)), lean.weight)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype, weight_dtype", [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_each_precision_gives_the_output_of_diffusers(
        dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool) -> None:
    plain, lean = pair(dtype, weight_dtype)
    x = torch.randn(4, 6, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = gradients(plain, x), gradients(lean, x)
    for one, other in zip(expected, found, strict=True):
        assert one is not None and other is not None and one.dtype == other.dtype
        unit = max(torch.finfo(t).eps for t in (dtype, weight_dtype))
        torch.testing.assert_close(other.float(), one.float(), rtol=8 * unit, atol=8 * unit * one.abs().max().item())


def test_the_backward_pass_keeps_the_input_and_one_number_per_row() -> None:
    kept: list[Tensor] = []
    _, lean = pair(torch.bfloat16)
    x = torch.randn(4, 6, 24).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lean(x)
    assert {(tensor.shape, tensor.dtype) for tensor in kept} == {
        (x.shape, x.dtype), (lean.weight.shape, lean.weight.dtype), (torch.Size((4, 6, 1)), torch.float32)}


def test_norms_without_weight_or_with_bias_stay_as_they_are() -> None:
    for layer in (RMSNorm(8, eps=1e-6, elementwise_affine=False), RMSNorm(8, eps=1e-6, bias=True)):
        use_lean_norms(layer)
        assert type(layer) is RMSNorm


@pytest.mark.parametrize("words, expected", [(("hardware=cpu",), True), (("hardware=g5",), False)])
def test_runs_on_a_cpu_use_both_forms(words: tuple[str, ...], expected: bool) -> None:
    recipe = resolve(load(compose_config(*words, "model=tiny_flow", "method=lora")), Path("runs/x"))
    parts = loading.load(replace(recipe, device="cpu"), torch.device("cpu"))
    kinds = {type(layer) for layer in loading.prepare(parts, recipe).modules()}
    assert (LeanRMSNorm in kinds, LoraLinear in kinds) == (expected, expected)
    assert (RMSNorm in kinds, Linear in kinds) == (not expected, not expected)
