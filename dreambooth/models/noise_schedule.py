"""The forward process of diffusion: how noise is added to latents, and what the model is trained to predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoiseSchedule(Protocol):
    """The forward process that a base model was trained with, and the training target of the model.

    Timesteps are integers in [0, length), drawn uniformly. The schedule decides the noise level of each timestep. A
    schedule that prefers some noise levels (flow matching with a shift, logit-normal sampling) therefore maps the
    uniform timesteps to its own distribution of noise levels.
    """

    @property
    def length(self) -> int:
        """Number of timesteps."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents x_t (N, C, H, W) for `timesteps` (N,)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the tensor that the model is trained to predict, (N, C, H, W).

        Raises:
            ValueError: the prediction type is unknown.
        """

    def denoise(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor, later: Tensor) -> Tensor:
        """Return the noisy latents (N, C, h, w) at the timesteps `later` (N,): one deterministic step of sampling.

        Args:
            noisy: the noisy latents at `timesteps`.
            prediction: the model's prediction for them.
        """

    def timestep_at(self, progress: float) -> int:
        """Return the timestep after a share of sampling: 0 is pure noise, 1 the lowest noise level."""

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio of each sample, (N,).

        Raises:
            ValueError: the schedule has none.
        """

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the min-SNR loss weight of each sample, (N,), with the signal-to-noise ratio capped at `gamma`.

        Raises:
            ValueError: the prediction type is unknown, or the schedule has no signal-to-noise ratio.
        """

    def debiased_weights(self, timesteps: Tensor) -> Tensor:
        """Return the loss weight of debiased estimation of each sample, (N,).

        Raises:
            ValueError: as `min_snr_weights`.
        """

    def loss_weights(self, timesteps: Tensor) -> Tensor | None:
        """Return the schedule's own loss weight of each sample, (N,), or None if all weights are 1."""

    def for_comparison(self) -> NoiseSchedule:
        """Return the schedule with which losses of different runs are compared.

        It has no loss weights, and it does not depend on settings that a run may change.
        """

    def denoiser_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the values (N,) that the denoiser receives for `timesteps` (N,).

        Depending on the schedule, these are the timesteps themselves or their noise levels.
        """


@dataclass(frozen=True)
class DiffusionSchedule:
    """The forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    x_0 are the latents, x_t the noisy latents at timestep t, and a_t is alphas_cumprod[t].
    """

    alphas_cumprod: Tensor  # (T,), already rescaled if the schedule has zero terminal SNR
    prediction_type: str  # epsilon, v_prediction, sample

    @property
    def length(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, sigma = self._coefficients(latents, timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise, x_0 or v, depending on the prediction type.

        v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D).
        """
        match self.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                signal, sigma = self._coefficients(latents, timesteps)
                return signal * noise - sigma * latents
            case "sample":
                return latents
        raise ValueError(f"unknown prediction type {self.prediction_type!r}")

    def denoise(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor, later: Tensor) -> Tensor:
        """Return the result of a DDIM step (Song et al. 2021, arXiv:2010.02502, eq. 12 with sigma = 0)."""
        signal, sigma = self._coefficients(noisy, timesteps)
        match self.prediction_type:
            case "epsilon":
                latents, noise = (noisy - sigma * prediction) / signal, prediction
            case "v_prediction":
                latents, noise = signal * noisy - sigma * prediction, sigma * noisy + signal * prediction
            case _:
                latents, noise = prediction, (noisy - signal * prediction) / sigma
        return self.add_noise(latents, noise, later)

    def timestep_at(self, progress: float) -> int:
        return round((1 - progress) * (self.length - 1))

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return one loss weight per sample, (N,): min-SNR weighting (Hang et al. 2023, arXiv:2303.09556, sec. 3.4).

        With snr = a_t / (1 - a_t) and w = min(snr, gamma), the loss weight is w for a model that predicts x_0, w / snr
        for epsilon, and w / (snr + 1) for v.
        """
        snr = self.snr(timesteps)
        return self._prediction_weights(snr.clamp(max=gamma), snr)

    def debiased_weights(self, timesteps: Tensor) -> Tensor:
        """Return one loss weight per sample, (N,): debiased estimation (Yu et al. 2023, arXiv:2310.08442).

        The loss weight of a model that predicts epsilon is 1 / sqrt(snr). This is the weight sqrt(snr) of the squared
        error of x_0, from which the weights of the other prediction types follow: sqrt(snr) / (snr + 1) for v.
        """
        snr = self.snr(timesteps)
        return self._prediction_weights(snr.sqrt(), snr)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return a_t / (1 - a_t)."""
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return alpha / (1 - alpha)

    def _prediction_weights(self, weights: Tensor, snr: Tensor) -> Tensor:
        """Return the weights (N,) of the squared errors of predictions that amount to `weights` of those of x_0.

        With pure noise (snr = 0), the weight for epsilon is 1.
        """
        match self.prediction_type:
            case "epsilon":
                return torch.where(snr > 0, weights / snr, torch.ones_like(snr))
            case "v_prediction":
                return weights / (snr + 1)
            case "sample":
                return weights
        raise ValueError(f"unknown prediction type {self.prediction_type!r}")

    def loss_weights(self, timesteps: Tensor) -> Tensor | None:
        return None

    def for_comparison(self) -> DiffusionSchedule:
        return self

    def denoiser_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def _coefficients(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors (N, 1, 1, 1): the factor of the signal and the factor of the noise."""
        alpha = self.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()
