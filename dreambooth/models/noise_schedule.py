"""The forward process of diffusion: which noise is added to latents, and what the model is trained to predict."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoiseSchedule(Protocol):
    """The forward process that a base was trained with, and the target that belongs to it.

    Timesteps are integers in [0, length) that are drawn uniformly. A schedule decides which noise level a timestep
    has, so one that prefers some levels (flow matching with a shift, logit-normal sampling) maps them itself.
    """

    @property
    def length(self) -> int:
        """Number of timesteps."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents x_t (N, C, H, W) for `timesteps` (N,)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the model is to predict, (N, C, H, W).

        Raises:
            ValueError: the prediction type is unknown.
        """

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return loss weights (N,) that cap the signal-to-noise ratio at gamma.

        Raises:
            ValueError: the prediction type is unknown.
        """

    def denoiser_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return what the denoiser is given in place of `timesteps` (N,): the timesteps themselves, or noise levels."""


@dataclass(frozen=True)
class DiffusionSchedule:
    """The forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, arXiv:2006.11239, eq. 4)."""

    alphas_cumprod: Tensor  # (T,), after any zero-terminal-SNR rescale
    prediction_type: str  # epsilon, v_prediction, sample

    @property
    def length(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, sigma = self._coefficients(latents, timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target: v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
        match self.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                signal, sigma = self._coefficients(latents, timesteps)
                return signal * noise - sigma * latents
            case "sample":
                return latents
        raise ValueError(f"unknown prediction type {self.prediction_type!r}")

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Loss weights (N,) that cap the signal-to-noise ratio at gamma (Hang et al. 2023, arXiv:2303.09556, sec. 3.4).

        min(snr, gamma) is the weight on x_0; an epsilon error is worth 1/snr of it and a v error 1/(snr + 1).
        """
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alpha / (1 - alpha)
        capped = snr.clamp(max=gamma)
        match self.prediction_type:
            case "epsilon":
                return torch.where(snr > 0, capped / snr, torch.ones_like(snr))
            case "v_prediction":
                return capped / (snr + 1)
            case "sample":
                return capped
        raise ValueError(f"unknown prediction type {self.prediction_type!r}")

    def denoiser_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def _coefficients(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of signal and noise, (N, 1, 1, 1) each."""
        alpha = self.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()
