"""The DreamBooth objective as pure tensor functions: noise and timesteps are arguments.

L = L_instance + prior_loss_weight * L_prior (Ruiz et al. 2023, arXiv:2208.12242, eq. 2), each term a mean over
its own half of the batch, so that prior_loss_weight means the same at every batch size.
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
    """The objective over a batch whose first `instances` rows are instance samples and the rest class samples.

    Args:
        prediction, goal: (N, C, H, W).
        instances: how many rows belong to the subject.
        prior_loss_weight: lambda.
        weights: (N,) per-sample weights for both halves, or None.
        mask: (N, 1, H, W) in [0, 1], the share of each position that counts, or None for everything.
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
    """Means (N,) of squared errors (N, C, H, W) inside the mask: sum m e / (C sum m).

    A small subject counts as much as a large one. Where the mask is 0 the gradient is exactly 0; a row whose whole mask
    is 0 (a crop that missed the subject) has loss 0.
    """
    inside = squares.shape[1] * mask.flatten(1).sum(1)
    return (squares * mask).flatten(1).sum(1) / inside.clamp(min=torch.finfo(inside.dtype).tiny)
