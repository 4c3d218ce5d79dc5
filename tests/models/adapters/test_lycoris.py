"""LoKr, LoHa and rank-stabilised scaling: what a layer computes is what is written, merged and read back."""

from typing import Any

import pytest
import torch
from torch import nn

from dreambooth.config.enums import BaseWeights, Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.models import families, lora
from dreambooth.models.adapters.factors import LoHa, LoKr, pairwise_products
from dreambooth.models.block_swap import BlockSwap
from dreambooth.models.quantization import quantise

TARGETS = families.of_architecture("sd15").adapter_targets
KINDS = [MethodKind.lokr, MethodKind.loha]
SETTINGS: list[dict[str, Any]] = [
    {"kind": MethodKind.lokr}, {"kind": MethodKind.lokr, "rank": 1, "decompose_both": True},
    {"kind": MethodKind.lokr, "rank": 2, "decompose_factor": 4, "use_rslora": True}, {"kind": MethodKind.loha},
    {"kind": MethodKind.loha, "rank": 2, "use_rslora": True}, {"kind": MethodKind.lora, "use_rslora": True}]


class Toy(nn.Module):
    """A linear layer and convolutions, named as in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.ModuleDict({"to_q": nn.Linear(40, 24), "proj_in": nn.Conv2d(6, 10, 3, padding=1, stride=2),
                                   "proj_out": nn.Conv2d(12, 24, 1)})


INPUTS = {"to_q": torch.randn(3, 7, 40), "proj_in": torch.randn(2, 6, 9, 9), "proj_out": torch.randn(2, 12, 5, 5)}


def taught(**settings: Any) -> tuple[Toy, Toy]:
    """The base, and the same with an adapter that is far from its start values."""
    torch.manual_seed(0)
    base, model = Toy(), Toy()
    model.load_state_dict(base.state_dict())
    method = Method(**{"name": "x", "rank": 4, "alpha": 6.0, "targets": Targets.all} | settings)
    lora.inject(model, method, TARGETS, 1, Dtype.fp32)
    for name, values in INPUTS.items():
        assert model.unet[name](values).equal(base.unet[name](values)), "an untrained adapter changes the base"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return base, model


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_merged_read_and_applied_are_the_same(settings: dict[str, Any]) -> None:
    base, model = taught(**settings)
    known = lora.adapter_weights(model)
    lora.merge(base, known)
    for name, values in INPUTS.items():
        wanted = model.unet[name](values)
        assert torch.allclose(base.unet[name](values), wanted, atol=1e-4), name
    other = Toy()
    lora.inject(other, Method(**{"name": "x", "rank": 4, "alpha": 6.0, "targets": Targets.all} | settings), TARGETS, 2,
                Dtype.fp32)
    lora.load_adapter_weights(other, known)
    for name, again in lora.adapter_weights(other).items():
        assert torch.allclose(again.delta, known[name].delta, rtol=1e-5, atol=1e-6)
    lora.inject(other := Toy(), Method("lora", MethodKind.dora, rank=4, targets=Targets.all), TARGETS, 2, Dtype.fp32)
    if settings["kind"] is not MethodKind.lora:
        with pytest.raises(ValueError, match="kind"):
            lora.load_adapter_weights(other, known)


@torch.no_grad()
def test_the_formulas_are_those_of_the_paper() -> None:
    """Yeh et al. 2024: a block of LoKr's change is C[i, j] B; an element of LoHa's is a product of two elements."""
    _, model = taught(kind=MethodKind.lokr)
    layer, known = model.unet["to_q"], lora.adapter_weights(model)["unet.to_q"]
    left, right = layer.lokr_w1["default"], layer.lokr_w2["default"]
    assert left.shape == (4, 5) and right.shape == (6, 8)  # 24 = 4 * 6 and 40 = 5 * 8; C is the smaller
    for i, j in ((0, 0), (1, 2), (3, 4)):
        block = known.delta[6 * i:6 * i + 6, 8 * j:8 * j + 8]
        assert torch.allclose(block, 6 / 4 * left[i, j] * right)  # alpha / rank
    _, model = taught(kind=MethodKind.loha, use_rslora=True)
    layer, known = model.unet["to_q"], lora.adapter_weights(model)["unet.to_q"]
    (a1, b1), (a2, b2) = ((getattr(layer, f"hada_w{n}_a")["default"], getattr(layer, f"hada_w{n}_b")["default"])
                          for n in (1, 2))
    wanted = 6 / 4**0.5 * (a1[7] @ b1[:, 11]) * (a2[7] @ b2[:, 11])  # alpha / sqrt(rank): Kalajdzievski 2023
    assert float(known.delta[7, 11]) == pytest.approx(float(wanted), rel=1e-5)


def test_a_loha_is_a_lora_of_its_squared_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    a1, b1, a2, b2 = (torch.randn(shape, generator=generator, dtype=torch.float64)
                      for shape in ((5, 3), (3, 7), (5, 3), (3, 7)))
    down, up = pairwise_products((a1, b1), (a2, b2))
    assert (down.shape, up.shape) == ((9, 7), (5, 9))
    assert torch.allclose(up @ down, (a1 @ b1) * (a2 @ b2), rtol=1e-12)
    assert torch.allclose(LoHa((a1, b1), (a2, b2)).delta, (a1 @ b1) * (a2 @ b2), rtol=1e-12)


def test_start_values_are_a_function_of_seed_and_name() -> None:
    for kind in KINDS:
        models = [Toy() for _ in range(3)]
        before = torch.get_rng_state()
        for model, seed in zip(models, (1, 1, 2), strict=True):
            lora.inject(model, Method("x", kind, rank=2, targets=Targets.all), TARGETS, seed, Dtype.fp32)
        assert torch.get_rng_state().equal(before)
        first, second, third = (torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])
                                for model in models)
        assert first.equal(second) and not first.equal(third)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [BaseWeights.int8, BaseWeights.fp8])
def test_beside_a_quantised_base_in_half_the_adapter_is_fp32(kind: MethodKind, weights: BaseWeights) -> None:
    torch.manual_seed(0)
    model = Toy().to(torch.bfloat16)
    quantise(model, torch.bfloat16, weights)
    lora.inject(model, Method("x", kind, rank=2, targets=Targets.all), TARGETS, 1, Dtype.bf16)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(model.unet[name](values).float().square().mean() for name, values in INPUTS.items())
    loss.backward()
    assert all(p.grad is not None for p in trained)


def test_adapters_of_swapped_blocks_stay_and_compute_the_same() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 8)}) for _ in range(4)])

    results = []
    for swapped in (False, True):
        torch.manual_seed(0)
        model = Blocks().requires_grad_(False)
        swap = BlockSwap([model.unet[0], model.unet[2]], 2, torch.device("cpu")) if swapped else None
        lora.inject(model, Method("x", MethodKind.lokr, rank=2), TARGETS, 1, Dtype.fp32)
        values = torch.ones(1, 8)
        for block in model.unet:
            values = block["to_q"](values)
        values.sum().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
        assert swap is None or len(swap.hosts) == 2
    assert len(results[0]) == 8 and all(a.equal(b) for a, b in zip(*results, strict=True))


def test_the_change_of_a_lokr_is_never_computed_in_a_step() -> None:
    """The tensors kept for the backward pass are far smaller than the weight of the layer."""
    torch.manual_seed(0)
    model = nn.Module()
    model.unet = nn.ModuleDict({"to_q": nn.Linear(256, 256)})
    kept: list[int] = []
    for kind, rank in ((MethodKind.lokr, 4), (MethodKind.loha, 2)):
        lora.inject(one := _copy(model), Method("x", kind, rank=rank), TARGETS, 1, Dtype.fp32)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            one.unet["to_q"](torch.randn(2, 256))
        assert kept and max(kept) < 256 * 256 / 8


def _copy(model: nn.Module) -> nn.Module:
    copy = nn.Module()
    copy.unet = nn.ModuleDict({"to_q": nn.Linear(256, 256)})
    copy.load_state_dict(model.state_dict())
    return copy


def test_lokr_factors_keep_their_order() -> None:
    left, right = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10.0]])
    assert LoKr((left,), (right,)).delta.tolist() == [[1.0, 2.0], [10.0, 20.0]]
    left, right = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert LoKr((left,), (right,)).delta.tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 1, 2], [0, 0, 3, 4]]
