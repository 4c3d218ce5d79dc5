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
    mask: Tensor | None = None, deltas: Tensor | None = None
) -> Losses:
    """Return the loss of a batch. The first `instances` rows are instance samples, and the other rows class samples.

    Args:
        prediction: the model's prediction, (N, C, H, W).
        goal: the target of the prediction, (N, C, H, W).
        instances: number of instance rows.
        prior_loss_weight: lambda in the paper.
        weights: weight of each row, of class samples as well as instance samples, (N,); None: all 1.
        mask: weight of each position, from 0 to 1, (N, 1, H, W); None: all 1.
        deltas: delta of the pseudo-Huber loss of each row, (N,); None: the squared error.
    """
    errors_at = (prediction - goal).square()
    if deltas is not None:
        errors_at = pseudo_huber(errors_at, deltas.view(-1, 1, 1, 1))
    errors = errors_at.flatten(1).mean(1) if mask is None else masked_mean(errors_at, mask)
    if weights is not None:
        errors = errors * weights
    instance = errors[:instances].mean()
    if instances == len(errors):
        return Losses(instance, instance, None)
    prior = errors[instances:].mean()
    return Losses(instance + prior_loss_weight * prior, instance, prior)


def pseudo_huber(squares: Tensor, delta: Tensor) -> Tensor:
    """Return the pseudo-Huber loss 2 delta^2 (sqrt(1 + e^2 / delta^2) - 1) of squared errors e^2.

    This is twice H_delta of Khrapov et al. 2024 (arXiv:2403.16728), as in kohya-ss/sd-scripts, so that it equals e^2
    where |e| is far below delta, and 2 delta |e| far above. The computed form, 2 e^2 / (1 + sqrt(1 + e^2 / delta^2)),
    is equal, and subtracts no numbers that are almost equal.
    """
    return 2 * squares / (1 + (1 + squares / delta.square()).sqrt())


def scheduled_deltas(snr: Tensor, delta: float) -> Tensor:
    """Return the delta of each row for its signal-to-noise ratio, (N,): (1 - delta) / (1 + snr^(-1/2))^2 + delta.

    It falls from 1 without noise to `delta` with pure noise, where outliers do most harm. Khrapov et al. 2024 let it
    fall exponentially with the timestep; this form is the schedule "snr" of kohya-ss/sd-scripts (train_util.py).
    """
    return (1 - delta) * snr / (snr.sqrt() + 1).square() + delta


def masked_mean(squares: Tensor, mask: Tensor) -> Tensor:
    """Return each row's mean (N,) of squared errors e (N, C, H, W), weighted by m (N, 1, H, W): sum m e / (C sum m).

    A small subject has the same weight in the loss as a large one. Where the mask is 0, the gradient is exactly 0. A
    row whose mask is 0 everywhere (a crop that does not contain the subject) has loss 0.
    """
    inside = squares.shape[1] * mask.flatten(1).sum(1)
    return (squares * mask).flatten(1).sum(1) / inside.clamp(min=torch.finfo(inside.dtype).tiny)
