"""The DreamBooth objective as pure tensor functions: noise and timesteps are arguments.

L = L_instance + prior_loss_weight * L_prior (Ruiz et al. 2023, arXiv:2208.12242, eq. 2), each term a mean over
its own half of the batch, so that prior_loss_weight means the same at every batch size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, arXiv:2006.11239, eq. 4)."""

    alphas_cumprod: Tensor  # (T,), after any zero-terminal-SNR rescale
    prediction_type: str  # epsilon, v_prediction, sample

    @property
    def length(self) -> int:
        return len(self.alphas_cumprod)


@dataclass(frozen=True)
class Losses:
    """0-d tensors. `prior` is None without prior preservation."""

    total: Tensor
    instance: Tensor
    prior: Tensor | None


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """x_t of shape (N, C, H, W) for `timesteps` (N,)."""
    signal, sigma = _coefficients(latents, timesteps, schedule)
    return signal * latents + sigma * noise


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """What the model is to predict, (N, C, H, W).

    v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

    Raises:
        ValueError: an unknown prediction type.
    """
    match schedule.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            signal, sigma = _coefficients(latents, timesteps, schedule)
            return signal * noise - sigma * latents
        case "sample":
            return latents
    raise ValueError(f"unknown prediction type {schedule.prediction_type!r}")


def min_snr_weights(timesteps: Tensor, gamma: float, schedule: Schedule) -> Tensor:
    """Loss weights (N,) that cap the signal-to-noise ratio at gamma (Hang et al. 2023, arXiv:2303.09556, sec. 3.4).

    min(snr, gamma) is the weight on x_0; an epsilon error is worth 1/snr of it and a v error 1/(snr + 1).
    """
    alpha = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)
    capped = snr.clamp(max=gamma)
    match schedule.prediction_type:
        case "epsilon":
            return torch.where(snr > 0, capped / snr, torch.ones_like(snr))
        case "v_prediction":
            return capped / (snr + 1)
        case "sample":
            return capped
    raise ValueError(f"unknown prediction type {schedule.prediction_type!r}")


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


def _coefficients(latents: Tensor, timesteps: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    alpha = schedule.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()
