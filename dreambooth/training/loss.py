"""The DreamBooth loss as pure tensor functions.

L = L_instance + prior_loss_weight * L_prior (Ruiz et al. 2023, arXiv:2208.12242, eq. 2). Each term is a mean over its
own half of the batch, so that prior_loss_weight has the same effect at every batch size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """The total loss and its two terms, as 0-d tensors. `prior` is None without prior preservation."""

    total: Tensor
    instance: Tensor
    prior: Tensor | None


def dreambooth_loss(
    prediction: Tensor, goal: Tensor, instances: int, prior_loss_weight: float, weights: Tensor | None = None,
    mask: Tensor | None = None
) -> Losses:
    """Return the loss of a batch. The first `instances` rows are instance samples, and the other rows class samples.

    Args:
        prediction: the model's prediction, (N, C, H, W).
        goal: the target of the prediction, (N, C, H, W).
        instances: number of instance rows.
        prior_loss_weight: lambda in the paper.
        weights: weight of each row, of class samples as well as instance samples, (N,); None: all 1.
        mask: weight of each position, from 0 to 1, (N, 1, H, W); None: all 1.
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
    """Return each row's mean (N,) of squared errors e (N, C, H, W), weighted by m (N, 1, H, W): sum m e / (C sum m).

    A small subject has the same weight in the loss as a large one. Where the mask is 0, the gradient is exactly 0. A
    row whose mask is 0 everywhere (a crop that does not contain the subject) has loss 0.
    """
    inside = squares.shape[1] * mask.flatten(1).sum(1)
    return (squares * mask).flatten(1).sum(1) / inside.clamp(min=torch.finfo(inside.dtype).tiny)
