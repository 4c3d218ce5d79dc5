"""Flow matching: noise levels, shift, loss weights and targets, against the equations and diffusers' own scheduler."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreambooth.config.enums import LossWeighting, TimestepSampling
from dreambooth.config.schema import Flow
from dreambooth.data.batches import Batch
from dreambooth.models import flow_matching
from dreambooth.models.flow_matching import FlowSchedule, build_schedule
from dreambooth.training.step import Objective


def test_logit_normal_levels_have_the_density_of_equation_19() -> None:
    """The share of levels below t is the normal distribution function of logit(t)."""
    levels = flow_matching.logit_normal(flow_matching.quantiles(100_000), 0.3, 0.8)
    for t in (0.05, 0.3, 0.5, 0.9):
        share = (levels < t).double().mean().item()
        expected = 0.5 * (1 + math.erf((math.log(t / (1 - t)) - 0.3) / 0.8 / math.sqrt(2)))
        assert share == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_levels_are_between_0_and_1_and_each_occurs_once(scale: float) -> None:
    """f of equation 20 is monotonic for the allowed scales, and the identity (reversed) for scale 0."""
    levels = flow_matching.mode(flow_matching.quantiles(), scale)
    assert levels.min() > 0 and levels.max() < 1
    assert (levels.diff() < 0).all()
    if scale == 0:
        torch.testing.assert_close(levels, flow_matching.quantiles().flip(0))


@pytest.mark.parametrize("config", [
    {"shift": 3.0}, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}])
def test_the_shift_is_that_of_diffusers(config: dict[str, object]) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from dreambooth.models.families import z_image

    scheduler = FlowMatchEulerDiscreteScheduler(**config)  # type: ignore[arg-type]
    tokens = 1024
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2], mu=mu)  # type: ignore[arg-type]
    shift = z_image.FAMILY.shift(dict(scheduler.config), tokens)
    expected = flow_matching.shifted(torch.tensor([0.9, 0.5, 0.2]), shift)
    torch.testing.assert_close(scheduler.sigmas[:3].float(), expected)


def test_typed_settings_replace_those_of_the_base_model() -> None:
    uniform = Flow(timestep_sampling=TimestepSampling.uniform)
    assert build_schedule(replace(uniform, shift=1.0), 6.0).levels[0] == 0.0005
    assert build_schedule(uniform, 6.0).levels[0] == pytest.approx(6 * 0.0005 / 1.0025)


def test_x_t_and_the_velocity() -> None:
    schedule = FlowSchedule(torch.tensor([0.25, 0.75], dtype=torch.float64))
    x, noise, t = torch.full((2, 1, 1, 1), 4.0), torch.full((2, 1, 1, 1), 8.0), torch.tensor([0, 1])
    assert schedule.add_noise(x, noise, t).flatten().tolist() == [5.0, 7.0]
    assert schedule.target(x, noise, t).flatten().tolist() == [4.0, 4.0]
    assert schedule.denoiser_timesteps(t).tolist() == [0.25, 0.75]


def test_the_loss_weights_are_those_of_diffusers() -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    levels = torch.tensor([0.1, 0.5, 0.9])
    for weighting in (LossWeighting.sigma_sqrt, LossWeighting.cosmap):
        found = flow_matching.loss_weights(levels, weighting)
        assert found is not None
        torch.testing.assert_close(found, compute_loss_weighting_for_sd3(weighting.value, levels))
    assert flow_matching.loss_weights(levels, LossWeighting.none) is None


def flow_batch() -> tuple[Batch, Tensor]:
    """A batch of two instance rows and two class rows, and a prediction for it."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = torch.randn(3, 4, 2, 4, 4, generator=generator)
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    return Batch(latents, noise, timesteps, torch.zeros(4, 1), num_instances=2), prediction


@pytest.mark.parametrize("weighting", LossWeighting)
def test_the_objective_is_the_loss_of_diffusers_script(weighting: LossWeighting) -> None:
    """mean(w (prediction - (noise - x_0))^2) for the instance rows, plus lambda times that of the class rows."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    schedule = FlowSchedule(flow_matching.quantiles(), weighting)
    batch, prediction = flow_batch()
    loss = Objective(schedule, 0.7)(lambda *_: prediction, batch)
    sigmas = schedule.levels[batch.timesteps].float().view(-1, 1, 1, 1)
    weights = compute_loss_weighting_for_sd3(weighting.value, sigmas)
    errors = (weights * (prediction - (batch.noise - batch.latents)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss.total, errors[:2].mean() + 0.7 * errors[2:].mean(), rtol=1e-6, atol=1e-6)


def test_losses_are_compared_with_uniform_levels() -> None:
    schedule = build_schedule(Flow(loss_weighting=LossWeighting.cosmap, shift=6.0), 1.0).for_comparison()
    torch.testing.assert_close(schedule.levels, flow_matching.quantiles())
    assert schedule.loss_weights(torch.tensor([0])) is None
