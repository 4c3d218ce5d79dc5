"""The DreamBooth loss as pure tensor functions.

L = L_instance + prior_loss_weight * L_prior (Ruiz et al. 2023, arXiv:2208.12242, eq. 2). Each term is a mean over its
own half of the batch, so that prior_loss_weight means the same at every batch size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """0-d tensors. `prior` is None without prior preservation."""

    total: Tensor
    instance: Tensor
    prior: Tensor | None


def dreambooth_loss(
    prediction: Tensor, goal: Tensor, instances: int, prior_loss_weight: float, weights: Tensor | None = None,
    mask: Tensor | None = None
) -> Losses:
    """The loss of a batch whose first `instances` rows are instance samples and whose other rows are class samples.

    Args:
        prediction: the model's prediction, (N, C, H, W).
        goal: what it should predict, (N, C, H, W).
        instances: number of instance rows.
        prior_loss_weight: lambda in the paper.
        weights: (N,) weight of each row of both halves; None: all 1.
        mask: (N, 1, H, W) in [0, 1], weight of each position; None: all 1.
    """
    squares = (prediction - goal).square()
    errors = squares.flatten(1).mean(1) if mask is None else masked_mean(squares, mask)
    if weights is not None:
        errors = errors * weights
    instance = errors[:instances].mean()
    if instances == len(errors):
        return Losses(instance, instance, None)
    prior = errors[instances:].mean()
    return Losses(instance + prior_loss_weight * prior, instance, prior)


def masked_mean(squares: Tensor, mask: Tensor) -> Tensor:
    """Means (N,) of squared errors e (N, C, H, W) inside the mask m (N, 1, H, W): sum m e / (C sum m).

    A small subject counts as much as a large one. Where the mask is 0, the gradient is exactly 0. A row whose mask is 0
    everywhere (a crop that does not contain the subject) has loss 0.
    """
    inside = squares.shape[1] * mask.flatten(1).sum(1)
    return (squares * mask).flatten(1).sum(1) / inside.clamp(min=torch.finfo(inside.dtype).tiny)
