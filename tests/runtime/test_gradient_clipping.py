"""Clipping by the global norm: the norm, and the gradients that the optimizer uses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreambooth.runtime import gradient_clipping
from dreambooth.runtime.engine import Engine

SHAPES = ((300, 70), (5,), ())


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters with gradients whose global norm is about 1.5 (21,006 elements), and one without a gradient."""
    torch.manual_seed(0)
    found = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, dtype=dtype) * 0.01
    return [*found, nn.Parameter(torch.zeros(3, dtype=dtype))]


def adamw(weights: list[nn.Parameter], fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.1, fused=fused, foreach=False)


def steps(*limits: float | None) -> tuple[Tensor, list[Tensor]]:
    """Return the norms and the weights after steps with these limits; each has a hundredth of the gradients before."""
    weights, engine = parameters(), Engine()
    optimizer = adamw(weights)
    norms = []
    for number, limit in enumerate(limits):
        factor = 0.01**number
        for weight, source in zip(weights, parameters(), strict=True):
            weight.grad = None if source.grad is None else source.grad * factor
        norms.append(engine.clip(optimizer, weights, limit))
        assert engine.step(optimizer)
    return torch.stack(norms), [weight.detach() for weight in weights]


@pytest.mark.parametrize("limits", [(0.3, 0.3), (0.3, 0.003), (0.3, None), (1e9, 1e9), (None, None)])
def test_fused_adamw_clips_as_pytorchs_function_does(limits: tuple[float | None, ...]) -> None:
    """The second step of AdamW depends on the factors of both gradients."""
    norm, found = steps(*limits)
    plain = parameters()
    optimizer = adamw(plain, fused=False)
    for number, limit in enumerate(limits):
        factor = 0.01**number
        for weight, source in zip(plain, parameters(), strict=True):
            weight.grad = None if source.grad is None else source.grad * factor
        given = [weight for weight in plain if weight.grad is not None]
        expected = nn.utils.clip_grad_norm_(given, float("inf") if limit is None else limit)
        assert norm[number].item() == pytest.approx(expected.item(), rel=1e-6)
        optimizer.step()
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)
    if limits[0] == 0.3:
        assert (found[0] - steps(None, None)[1][0]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [lambda weights: adamw(weights, fused=False),
                                  lambda weights: torch.optim.SGD(weights, lr=0.1)])
def test_gradients_of_other_optimizers_are_divided(make: Any) -> None:
    weights = parameters()
    norm = Engine().clip(make(weights), weights, 0.3)
    clipped = gradient_clipping.total_norm([weight.grad for weight in weights if weight.grad is not None])
    assert (norm.item() > 1, clipped.item()) == (True, pytest.approx(0.3, rel=1e-5))


def test_gradients_in_fp64_are_divided_too() -> None:
    """The fused step takes an fp32 number only."""
    weights = parameters(torch.float64)
    optimizer = adamw(weights)
    Engine().clip(optimizer, weights, 0.3)
    assert gradient_clipping.total_norm([w.grad for w in weights if w.grad is not None]).item() == pytest.approx(0.3)
    optimizer.step()


def test_a_limit_that_is_not_reached_changes_no_bit() -> None:
    """The divisor is exactly 1."""
    for one, other in zip(steps(1e9, 1e9)[1], steps(None, None)[1], strict=True):
        assert torch.equal(one, other)


def test_a_loss_scale_and_the_factor_are_both_applied() -> None:
    engine = Engine(scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000))
    engine.scaler.scale(torch.zeros(1))  # creates the scale
    scaled, weights = parameters(), parameters()
    for parameter in scaled:
        if parameter.grad is not None:
            parameter.grad *= 8
    optimizer, plain = adamw(scaled), adamw(weights)
    norms = engine.clip(optimizer, scaled, 0.3), Engine().clip(plain, weights, 0.3)
    assert engine.step(optimizer) and Engine().step(plain)
    assert norms[0].item() == norms[1].item()
    for one, other in zip(scaled, weights, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_is_that_of_all_elements(dtype: torch.dtype) -> None:
    gradients = [p.grad for p in parameters(dtype) if p.grad is not None]
    gradients.append(torch.randn(6, 8, dtype=dtype).t())  # not contiguous
    for given in (gradients, gradients[:3]):
        exact = torch.cat([gradient.double().flatten() for gradient in given]).norm()
        assert gradient_clipping.total_norm(given).item() == pytest.approx(
            exact.item(), rel={torch.float32: 1e-6, torch.float64: 1e-13}.get(dtype, 1e-2))
    assert gradient_clipping.total_norm([]).item() == 0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(value: float) -> None:
    weights = parameters()
    assert weights[0].grad is not None
    weights[0].grad[0, 0] = value
    assert not torch.isfinite(Engine().clip(adamw(weights), weights, 1.0))
