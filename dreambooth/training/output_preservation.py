"""Output preservation (prior.kind=output): a prior term without class images, for adapters.

The adapter must not change what the model predicts for the class prompt. Each instance row of a step has a class row
with the same noisy latents x_t and timestep t, and with the class caption c' of its photo. The target of the class row
is the prediction of the base model f_0, which is the model with its adapters disabled (theta: the adapters):

    L_prior = mean |f_theta(x_t, t, c') - f_0(x_t, t, c')|^2

It takes the place of the loss of class images in L = L_instance + prior_loss_weight * L_prior. The trainers of the
field call it differential output preservation (ostris/ai-toolkit, SDTrainer.py, get_prior_prediction; kohya-ss/
sd-scripts, pull request 1710, with regularization images) and prior prediction (Nerogar/OneTrainer, concept type
PRIOR_PREDICTION). The first one also takes the noisy latents of the photo, and puts the class in place of the trigger
word in its caption.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dreambooth.config.recipe import Recipe
from dreambooth.data.batches import Batch
from dreambooth.models import lora
from dreambooth.models.noise_schedule import NoiseSchedule
from dreambooth.runtime.engine import Engine

Predict = Callable[..., Tensor]  # (latents, timesteps, text[, size_and_crop]) -> prediction


def base_model(model: nn.Module, recipe: Recipe) -> Predict | None:
    """Return a function that predicts as the base model does, without gradients; None: the run does not need it.

    The function uses the weights of `model` itself, so that it needs no memory for weights.

    Args:
        model: the TrainedModel, with its adapters and without wrappers of data parallelism.
    """
    if not recipe.preserves_output:
        return None
    adapters = [layer for _, layer in lora.layers(model)]

    @torch.no_grad()
    def predict(*inputs: Tensor) -> Tensor:
        with lora.bypassed(adapters):
            prediction: Tensor = model.forward(*inputs)  # model(...) would compile the model a second time
        return prediction

    return predict


def with_base_targets(batches: Sequence[Batch], base: Predict, schedule: NoiseSchedule,
                      engine: Engine) -> list[Batch]:
    """Return the micro-batches with the predictions of the base model as targets of their class rows.

    The predictions are made before the forward pass that is trained: gradient checkpointing repeats this pass during
    the backward pass, when the adapters must be enabled.

    Args:
        base: the result of `base_model`.
    """
    return [_with_base_target(batch, base, schedule, engine) for batch in batches]


def _with_base_target(batch: Batch, base: Predict, schedule: NoiseSchedule, engine: Engine) -> Batch:
    _, rows = batch.halves()
    noisy = schedule.add_noise(rows.latents, rows.noise, rows.timesteps)
    size_and_crop = () if rows.size_and_crop is None else (rows.size_and_crop,)
    with engine.autocast():
        prediction = base(noisy, schedule.denoiser_timesteps(rows.timesteps), rows.text, *size_and_crop)
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    return replace(batch, target=torch.cat([target[:batch.num_instances], prediction.to(target.dtype)]))
