"""The default objective of a sweep (evaluate.objective): the loss of the photos, with fixed noise and timesteps."""

import math

import torch

from dreambooth.data.batches import Batch
from dreambooth.data.photo_set import View
from dreambooth.errors import Diverged
from dreambooth.models.pipeline import evaluating
from dreambooth.training.setup import Setup
from dreambooth.training.step import divergence_message
from dreambooth.utils import rng
from dreambooth.utils.console import Console

TIMESTEPS_PER_PHOTO = 8  # they are the midpoints of 8 equal parts of the noise schedule
MAX_PHOTOS = 32  # of more photos, this many are used, so that the time of a run's end does not grow with its photos


def measured_photos(count: int) -> list[int]:
    """Return the numbers of those of `count` photos that `instance_loss` uses.

    It uses all photos, or MAX_PHOTOS evenly spaced ones if there are more.
    """
    used = min(count, MAX_PHOTOS)
    return [position * count // used for position in range(used)]


def instance_loss(setup: Setup, console: Console | None = None) -> float:
    """Return the mean squared error of the predictions for the instance photos with the current trained weights.

    The photos, noise and timesteps do not depend on train.seed. In a sweep, they are the same in all trials that have
    the same latent shape. The error is squared, and never weighted by SNR, so that trials with different losses can be
    compared.

    Args:
        console: shows a progress bar; None: no output.

    Raises:
        Diverged: the error is not finite.
    """
    batches, schedule = setup.batches, setup.objective.noise_schedule
    photo_set, count = batches.photo_sets[0], TIMESTEPS_PER_PHOTO
    numbers = measured_photos(len(photo_set.photos))
    unweighted = setup.objective.for_comparison()
    timesteps = torch.tensor([int((level + 0.5) * schedule.length / count) for level in range(count)])
    total = 0.0
    with (console or Console(quiet=True)).bar("instance loss", len(numbers)) as bar:
        for number in numbers:
            photo = photo_set.photos[number]
            view, shape = View(number, False, None), batches.latent_shape_of(photo)
            latents = batches.latents.sample(photo_set, [view], torch.zeros(1, *shape))
            mask, size_and_crop = batches.loss_mask(photo_set, [view]), batches.size_and_crop(photo_set, [view])
            noise = torch.stack([rng.normal(shape, "objective", number, level) for level in range(count)])
            text = batches.encode_prompt(photo.caption)
            batch = Batch(
                latents=latents.to(batches.device).expand(count, -1, -1, -1), noise=noise.to(batches.device),
                timesteps=timesteps.to(batches.device), text=text.expand(count, *text.shape[1:]), num_instances=count,
                mask=None if mask is None else mask.to(batches.device),
                size_and_crop=None if size_and_crop is None else size_and_crop.to(batches.device).expand(count, -1))
            # Call `forward`, because calling the module would compile it for this one use, which takes minutes.
            with torch.no_grad(), evaluating(setup.trained):
                total += float(unweighted(setup.trained.forward, batch).instance)
            bar.tick()
    if not math.isfinite(total):
        raise Diverged(divergence_message(f"the loss of the photos after step {setup.state.step} is {total}"))
    return total / len(numbers)
