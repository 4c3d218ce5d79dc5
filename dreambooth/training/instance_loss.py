"""What a sweep minimises unless evaluate.objective names a measure: the instance loss on fixed noise and timesteps."""

from dataclasses import replace

import torch

from dreambooth.data.batch import Batch
from dreambooth.data.batches import View
from dreambooth.models.pipeline import evaluating
from dreambooth.training.setup import Setup
from dreambooth.utils import rng

LEVELS = 8  # timesteps a photo, the middles of equal parts of the schedule


def instance_loss(setup: Setup) -> float:
    """Mean squared error of the model's prediction over the instance photos, with the live weights of the modules.

    The same photos, noise and timesteps for every run on a model of this size, whatever its seed, and never weighted
    by SNR: trials of different train.snr_gamma are judged alike.
    """
    batches, schedule = setup.batches, setup.objective.noise_schedule
    concept = batches.concepts[0]
    plain = replace(setup.objective, snr_gamma=None)
    total = 0.0
    for number, photo in enumerate(concept.photos):
        view, shape = View(number, False, None), batches.shape(photo)
        clean = batches.latents.sample(concept, [view], torch.zeros(1, *shape))
        mask = batches.mask(concept, [view])
        noise = torch.stack([rng.normal(shape, "objective", number, level) for level in range(LEVELS)])
        steps = torch.tensor([int((level + 0.5) * schedule.length / LEVELS) for level in range(LEVELS)])
        text = batches.text(photo.caption)
        batch = Batch(
            latents=clean.to(batches.device).expand(LEVELS, -1, -1, -1), noise=noise.to(batches.device),
            timesteps=steps.to(batches.device), text=text.expand(LEVELS, *text.shape[1:]), instances=LEVELS,
            mask=None if mask is None else mask.to(batches.device))
        with torch.no_grad(), evaluating(setup.trained):  # forward: compiling it for this one use would take minutes
            total += float(plain(setup.trained.forward, batch).instance)
    return total / len(concept.photos)
