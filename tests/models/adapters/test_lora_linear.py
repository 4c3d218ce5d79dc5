"""Linear layers with a LoRA that is added by one matrix product."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreambooth.config.enums import BaseWeights, Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.models import families, lora
from dreambooth.models.adapters.lora_linear import LoraLinear, add_in_place
from dreambooth.models.layers.rms_norm import use_lean_norms
from dreambooth.models.quantization import quantise

TARGETS = families.of_architecture("sd15").adapter_targets
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the largest value


def pair(kind: MethodKind = MethodKind.lora, dtype: Dtype = Dtype.fp32, base: BaseWeights | None = None,
         compute: torch.dtype = torch.float32, **more: Any) -> tuple[nn.Module, nn.Module]:
    """Return a layer with an adapter that is not 0, with the forward pass of peft, and ours with the same weights."""
    torch.manual_seed(0)
    toy = nn.Module()
    toy.unet = nn.ModuleDict({"to_q": nn.Linear(40, 24)})
    if base is not None:
        quantise(toy, compute, base)
        toy.to("cpu")  # bitsandbytes quantises here
    method = Method(name=kind.value, kind=kind, targets=Targets.all, **{"rank": 4, "alpha": 6.0} | more)
    lora.inject(toy, method, TARGETS, 0, dtype)
    add_in_place(toy)
    ours: Any = toy.unet["to_q"]
    nn.init.normal_(ours.lora_B["default"].weight)
    plain = copy.deepcopy(ours)
    plain.__class__ = Linear
    return plain, ours


def results(layer: Any, x: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Return the output and the gradients of the input and of both factors."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = layer(x)
    (output.float() * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    factors = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    assert x.grad is not None
    return [output.detach(), x.grad, *factors]


def assert_equal_but_for_rounding(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * other.abs().max().item())


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 5, 40), (2, 3, 5, 40)])
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...]) -> None:
    plain, ours = (layer.double() for layer in pair())
    assert type(ours) is LoraLinear
    x = torch.randn(shape, dtype=torch.float64)
    assert_equal_but_for_rounding(results(ours, x), results(plain, x), torch.float64)


def test_an_input_that_is_not_contiguous() -> None:
    plain, ours = pair()
    x = torch.randn(40, 5, 2).permute(2, 1, 0)
    assert_equal_but_for_rounding(results(ours, x), results(plain, x), torch.float32)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_computes_as_peft_does(base: torch.dtype) -> None:
    plain, ours = pair(dtype=Dtype.bf16)
    for layer in (plain, ours):
        layer.get_base_layer().to(base)  # type: ignore[operator]
    x = torch.randn(2, 5, 40).to(base)
    assert_equal_but_for_rounding(
        results(ours, x, torch.bfloat16), results(plain, x, torch.bfloat16), torch.bfloat16)


def test_a_base_model_in_half_precision_without_autocast_computes_as_peft_does() -> None:
    plain, ours = pair()
    for layer in (plain, ours):
        layer.get_base_layer().bfloat16()  # type: ignore[operator]
    x = torch.randn(2, 5, 40).bfloat16()
    assert_equal_but_for_rounding(results(ours, x), results(plain, x), torch.bfloat16)


@pytest.mark.parametrize("base", [BaseWeights.int8, BaseWeights.fp8, BaseWeights.nf4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_base_model_computes_as_peft_does(base: BaseWeights, dtype: torch.dtype) -> None:
    plain, ours = pair(dtype=Dtype.fp32 if dtype is torch.float32 else Dtype.bf16, base=base, compute=dtype)
    assert type(ours) is LoraLinear
    x, autocast = torch.randn(2, 5, 40), None if dtype is torch.float32 else dtype
    assert_equal_but_for_rounding(results(ours, x, autocast), results(plain, x, autocast), dtype)


def test_dropout_drops_values_of_samples() -> None:
    plain, ours = pair(dropout=0.5)
    x = torch.randn(2, 5, 40)
    for layer in (plain, ours):
        layer.lora_dropout["default"].keys = torch.tensor([3, 4])  # type: ignore[index]
    assert_equal_but_for_rounding(results(ours, x), results(plain, x), torch.float32)
    assert not torch.equal(ours(x), ours.eval()(x))


def test_without_its_adapter_the_layer_computes_as_the_base_model() -> None:
    _, ours = pair()
    x = torch.randn(2, 5, 40)
    with lora.bypassed([ours]):
        assert torch.equal(ours(x), ours.get_base_layer()(x))  # type: ignore[operator]
    assert not torch.equal(ours(x), ours.get_base_layer()(x))  # type: ignore[operator]


def test_no_gradient_of_the_size_of_the_output_is_copied() -> None:
    """An addition in place to a view would be recorded as CopySlices."""
    _, ours = pair()
    recorded, nodes = set(), [ours(torch.randn(2, 5, 40, requires_grad=True)).grad_fn]
    while nodes:
        node = nodes.pop()
        recorded.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert {"AddmmBackward0", "MmBackward0"} <= recorded
    assert not any("CopySlices" in name for name in recorded) and "MulBackward0" not in recorded


def test_dora_stays_with_peft() -> None:
    assert type(pair(MethodKind.dora)[1]) is Linear


def test_a_second_adapter_is_added_as_in_peft() -> None:
    plain, ours = pair()
    for layer in (plain, ours):
        torch.manual_seed(1)
        layer.update_layer("second", 4, lora_alpha=4, config=LoraConfig(init_lora_weights=False))  # type: ignore[operator]
        layer.set_adapter(["default", "second"])  # type: ignore[operator]
    x = torch.randn(2, 5, 40)
    assert torch.equal(ours(x), plain(x))


def test_both_forms_compile_and_can_be_recomputed() -> None:
    """In one graph without breaks, and in the backward pass of checkpointing."""
    norm = RMSNorm(40, eps=1e-5)
    use_lean_norms(norm)
    model = nn.Sequential(norm.requires_grad_(False), pair()[1])
    x = torch.randn(2, 5, 40)
    expected, found = [], []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for results, call in (expected, model), (found, compiled), (found, lambda x: checkpoint(
            model, x, use_reentrant=False)):
        given = x.clone().requires_grad_()
        model.zero_grad()
        output = call(given)
        output.square().sum().backward()
        results += [output.detach(), given.grad, *(weight.grad.clone() for weight in model.parameters()
                                                   if weight.grad is not None)]
    assert len(expected) == 4 and len(found) == 8
    for one, other in zip(found, expected * 2, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_lora_imports_neither_bitsandbytes_nor_the_compiler_of_torch() -> None:
    """peft would import both, which takes a second, though only quantised layers need them."""
    code = ("import sys; from dreambooth.models import loading; loading.import_libraries();"
            "from tests.models.adapters.test_lora_linear import pair; pair();"
            "print([name for name in ('bitsandbytes', 'torch._inductor.compile_fx') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert result.stdout == "[]\n"
