"""The engine: clipping of gradients, and numbers that are read from the device later."""

import math

import pytest
import torch

from dreambooth.runtime.async_readback import AsyncReadback
from dreambooth.runtime.engine import Engine


def test_numbers_are_read_back_unchanged() -> None:
    assert AsyncReadback(torch.tensor([1.5, math.inf])).read() == [1.5, math.inf]


def test_without_a_limit_gradients_stay_unchanged_and_their_norm_is_returned() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert float(Engine().clip(optimizer, [weight], None)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert float(Engine().clip(optimizer, [weight], 1.0)) == 5.0
    assert weight.grad.norm() == pytest.approx(1.0, abs=1e-5)
