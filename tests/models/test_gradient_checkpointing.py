"""Recomputed transformers: a batch is split only if it has enough samples."""

import pytest
import torch

from dreambooth.models.gradient_checkpointing import _checkpointed


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_groups_have_at_least_one_sample_each(rows: int) -> None:
    """With output preservation, every second step of a batch of one photo has one sample."""
    seen: list[int] = []

    def forward(x: torch.Tensor, scale: float, *, shift: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(x))
        return (x * scale + shift,)

    x = torch.arange(rows * 3.0).view(rows, 3).requires_grad_()
    [y] = _checkpointed(forward, 2, x, 2.0, shift=torch.ones(rows, 3))
    assert y.equal(x * 2 + 1)
    assert seen == {1: [1], 2: [1, 1], 3: [2, 1]}[rows]
    y.sum().backward()
    assert x.grad is not None and x.grad.equal(torch.full((rows, 3), 2.0))
