"""The forward process of diffusion: what noise is added, and what the model is trained to predict. Pure functions."""

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


def _coefficients(latents: Tensor, timesteps: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    alpha = schedule.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()
