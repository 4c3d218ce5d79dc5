"""Flow matching: noise levels, timestep sampling, shift and loss weights, as pure tensor functions.

Rectified flow (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206, eq. 13) connects latents x_0 and
noise by a straight line:

    x_t = (1 - t) x_0 + t noise,  t in (0, 1)

t is the noise level, sigma in the schedulers of diffusers. The model is trained to predict the velocity
dx_t / dt = noise - x_0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth.config.enums import LossWeighting, TimestepSampling
from dreambooth.config.schema import Flow

LENGTH = 1000  # number of timesteps, and so of different noise levels


def quantiles(length: int = LENGTH) -> Tensor:
    """Return the midpoints of `length` equal intervals of (0, 1): (length,), fp64, increasing."""
    return (torch.arange(length, dtype=torch.float64) + 0.5) / length


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Return noise levels whose logit has a normal distribution, for uniformly distributed u (Esser et al., eq. 19).

    The result is the inverse of the distribution function at u: sigmoid(mean + std * Phi^-1(u)).
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float) -> Tensor:
    """Return noise levels with mode sampling with heavy tails, for uniformly distributed u (Esser et al., eq. 20).

    f(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u). A positive scale s prefers the middle, a negative scale the ends.
    """
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Return noise levels t shifted to s t / (1 + (s - 1) t) (Esser et al., eq. 23).

    With s > 1, noise levels are higher. Large pictures need more noise, because neighbouring pixels are more alike.
    """
    return shift * levels / (1 + (shift - 1) * levels)


def dynamic_shift(image_tokens: int, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float) -> float:
    """Return the shift for pictures of `image_tokens` tokens: e^mu, with mu linear in the number of tokens.

    This is the shift of schedulers of diffusers with use_dynamic_shifting=True and time_shift_type="exponential".

    Args:
        base_tokens, max_tokens: two numbers of tokens.
        base_shift, max_shift: mu at these numbers of tokens.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (image_tokens - base_tokens))


def loss_weights(levels: Tensor, weighting: LossWeighting) -> Tensor | None:
    """Return the loss weight of each noise level, or None if all weights are 1.

    sigma_sqrt is t^-2. cosmap is 2 / (pi (1 - 2 t + 2 t^2)), which weights the loss as sampling with the density of
    CosMap does (Esser et al., eq. 21).
    """
    match weighting:
        case LossWeighting.none:
            return None
        case LossWeighting.sigma_sqrt:
            return levels.pow(-2)
        case LossWeighting.cosmap:
            return 2 / (math.pi * (1 - 2 * levels + 2 * levels.square()))


@dataclass(frozen=True)
class FlowSchedule:
    """A NoiseSchedule (noise_schedule.py) of flow matching.

    Timestep i has the noise level levels[i]. Timesteps are drawn uniformly, so `levels` decides how often each range of
    noise levels is trained.
    """

    levels: Tensor  # (T,), fp64: the noise level t of each timestep, in (0, 1)
    weighting: LossWeighting = LossWeighting.none
    descending: bool = False  # whether the levels decrease

    @property
    def length(self) -> int:
        return len(self.levels)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = (1 - t) x_0 + t noise."""
        level = self._levels(latents, timesteps).view(-1, 1, 1, 1)
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity, noise - x_0."""
        return noise - latents

    def denoise(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor, later: Tensor) -> Tensor:
        """Return the result of an Euler step along the predicted velocity."""
        steps = self._levels(noisy, later) - self._levels(noisy, timesteps)
        return noisy + steps.view(-1, 1, 1, 1) * prediction

    def timestep_at(self, progress: float) -> int:
        return round((progress if self.descending else 1 - progress) * (self.length - 1))

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        raise ValueError("min-SNR weighting is not defined for flow matching")

    def debiased_weights(self, timesteps: Tensor) -> Tensor:
        raise ValueError("debiased estimation is not defined for flow matching")

    def snr(self, timesteps: Tensor) -> Tensor:
        raise ValueError("loss thresholds by the signal-to-noise ratio are not defined for flow matching")

    def loss_weights(self, timesteps: Tensor) -> Tensor | None:
        return loss_weights(self.levels.to(timesteps.device)[timesteps], self.weighting)

    def for_comparison(self) -> "FlowSchedule":
        """Return the schedule with uniformly distributed noise levels and no loss weights."""
        return FlowSchedule(quantiles(len(self.levels)))

    def denoiser_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the noise levels, in fp32."""
        return self.levels.to(timesteps.device)[timesteps].float()

    def _levels(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        return self.levels.to(latents)[timesteps]


def build_schedule(flow: Flow, shift: float) -> FlowSchedule:
    """Return the schedule that the config group `flow` describes.

    Args:
        shift: the shift of the base model; flow.shift replaces it.
    """
    u = quantiles()
    match flow.timestep_sampling:
        case TimestepSampling.uniform:
            levels = u
        case TimestepSampling.logit_normal:
            levels = logit_normal(u, flow.logit_mean, flow.logit_std)
        case TimestepSampling.mode:
            levels = mode(u, flow.mode_scale)
    return FlowSchedule(shifted(levels, shift if flow.shift is None else flow.shift), flow.loss_weighting,
                        descending=flow.timestep_sampling is TimestepSampling.mode)
