"""Output preservation (prior.kind=output): a prior term without class images, for adapters.

The adapter must not change what the model predicts for the class prompt c'. The target of a class row is the prediction
of the base model f_0, which is the model with its adapters disabled (theta: the adapters):

    L_prior = mean |f_theta(x_t, t, c') - f_0(x_t, t, c')|^2

It takes the place of the loss of class images in L = L_instance + prior_loss_weight * L_prior. The trainers of the
field call it differential output preservation (ostris/ai-toolkit, SDTrainer.py, get_prior_prediction) and prior
prediction (Nerogar/OneTrainer, concept type PRIOR_PREDICTION; kohya-ss/sd-scripts, pull request 1710).

They take x_t from the photos, or from regularization images. From the photos, the class is preserved only where a noisy
photo of the subject is: on the tiny base, class drift was four times that of class images. Here, x_t is a noisy state
of a picture that the base model is drawing. The prediction f_0 is both the target and the next denoising step of this
picture, so that the pictures cost no pass of their own. (Data-free distillation draws its training states from the
teacher in the same way: Gu et al. 2023, arXiv:2306.05544.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dreambooth.config.recipe import Recipe
from dreambooth.data.batches import Batch, join_batches
from dreambooth.models import lora
from dreambooth.models.noise_schedule import NoiseSchedule
from dreambooth.runtime.engine import Engine
from dreambooth.utils import rng

STEPS = 20  # denoising steps per picture, one per training step
Predict = Callable[..., Tensor]  # (latents, timesteps, text[, size_and_crop]) -> prediction


def base_model(model: nn.Module) -> Predict:
    """Return a function that predicts as the base model does, without gradients.

    The function uses the weights of `model` itself, so that it needs no memory for weights.

    Args:
        model: the TrainedModel, with its adapters and without wrappers of data parallelism.
    """
    adapters = [layer for _, layer in lora.layers(model)]

    @torch.no_grad()
    def predict(*inputs: Tensor) -> Tensor:
        with lora.bypassed(adapters):
            prediction: Tensor = model.forward(*inputs)  # model(...) would compile the model a second time
        return prediction

    return predict


@dataclass
class OutputPreservation:
    """Adds class rows to the micro-batches of a step: states of pictures that the base model draws.

    Picture k of class row i starts at a state of pure noise, and is at its next denoising step in each training step
    with class rows. The rows are at different steps of their pictures, so that a training step has low and high noise
    levels. All states of a step are a function of the seed and of the last STEPS steps with class rows. A checkpoint
    therefore does not store them: after resuming, and before the first step, they are drawn again.

    Attributes:
        base: the result of `base_model`.
        texts: the class prompts, one tensor (1, ...) each: token ids or hidden states on the device.
        shape: shape (C, h, w) of the latents of a square picture.
        rows: class rows per micro-batch and process.
        micro_batches: micro-batches per step.
        size_and_crop: (6,), see Batches.size_and_crop; None: the model does not use it.
        steps: denoising steps per picture.
        interval: training steps per step with class rows; the first has them.
    """

    base: Predict
    schedule: NoiseSchedule
    texts: Sequence[Tensor]
    shape: tuple[int, int, int]
    rows: int
    micro_batches: int
    seed: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    size_and_crop: Tensor | None = None
    steps: int = STEPS
    interval: int = 1
    _states: list[Tensor] = field(default_factory=list)  # the states of the next step, (rows, C, h, w) per micro-batch
    _next: int | None = None  # the step of these states, counted as completed steps with class rows before it

    def __call__(self, batches: Sequence[Batch], step: int, engine: Engine) -> list[Batch]:
        """Return the micro-batches of a step with their class rows, if this step has class rows.

        The base model predicts before the forward pass that is trained, and not within it: gradient checkpointing
        repeats that pass during the backward pass, when the adapters must be enabled.

        Args:
            batches: micro-batches with instance rows only.
            step: number of completed steps.
        """
        step, later = divmod(step, self.interval)
        if later:
            return list(batches)
        if self._next != step:
            self._states = [torch.zeros(self.rows, *self.shape, dtype=self.dtype, device=self.device)
                            for _ in range(self.micro_batches)]
            for earlier in range(step - self.steps + 1, step):
                self._draw(earlier, engine)
        class_batches = self._draw(step, engine)
        self._next = step + 1
        return [self._join(*pair) for pair in zip(batches, class_batches, strict=True)]

    def _draw(self, step: int, engine: Engine) -> list[Batch]:
        """Return the class rows of each micro-batch of a step, and denoise their states for the next step."""
        return [self._draw_rows(micro, step, engine) for micro in range(self.micro_batches)]

    def _draw_rows(self, micro: int, step: int, engine: Engine) -> Batch:
        first = (micro * self.world_size + self.rank) * self.rows
        rows = [(index, *self._picture(index, step)) for index in range(first, first + self.rows)]
        states = torch.stack([self._noise(index, number) if phase == 0 else state
                              for (index, number, phase), state in zip(rows, self._states[micro], strict=True)])
        now, later = (torch.tensor([self._timestep(index, number, phase + steps) for index, number, phase in rows]).to(
            self.device) for steps in (0, 1))
        texts = [self.texts[(index + number) % len(self.texts)] for index, number, _ in rows]
        text = texts[0] if len(self.texts) == 1 else torch.cat(texts)
        size_and_crop = None if self.size_and_crop is None else self.size_and_crop.expand(self.rows, -1)
        with engine.autocast():
            prediction = self.base(states, self.schedule.denoiser_timesteps(now), text, *(
                () if size_and_crop is None else (size_and_crop,))).to(self.dtype)
        self._states[micro] = self.schedule.denoise(states, prediction, now, later)
        return Batch(states, torch.zeros_like(states), now, text, self.rows, size_and_crop=size_and_crop, noisy=states,
                     target=prediction)

    def _picture(self, index: int, step: int) -> tuple[int, int]:
        """Return the number of the picture that class row `index` of a step shows, and its denoising step."""
        total = self.rows * self.micro_batches * self.world_size
        return divmod(step + index * self.steps // total, self.steps)

    def _timestep(self, index: int, number: int, phase: int) -> int:
        """Return the timestep of a denoising step. After the first, the steps have random positions in equal parts."""
        if phase == 0:
            return self.schedule.timestep_at(0.0)
        share = rng.stream(self.seed, number, index, "class", "timestep").random()
        return self.schedule.timestep_at(min(1.0, (phase - 1 + share) / max(1, self.steps - 1)))

    def _noise(self, index: int, number: int) -> Tensor:
        return rng.normal(self.shape, self.seed, number, index, "class", "noise").to(self.device, self.dtype)

    def _join(self, batch: Batch, rows: Batch) -> Batch:
        schedule = self.schedule
        if len(batch.text) == len(batch.timesteps) and len(rows.text) < self.rows:  # each row has its own prompt
            rows = replace(rows, text=rows.text.expand(self.rows, *rows.text.shape[1:]))
        batch = replace(batch, noisy=schedule.add_noise(batch.latents, batch.noise, batch.timesteps),
                        target=schedule.target(batch.latents, batch.noise, batch.timesteps))
        return join_batches([batch, rows])


def build(recipe: Recipe, model: nn.Module, schedule: NoiseSchedule, texts: Sequence[Tensor],
          shape: tuple[int, int, int], engine: Engine, with_size_and_crop: bool) -> OutputPreservation | None:
    """Build the class rows of a run; None: the run does not preserve the output of its base model.

    Args:
        model: the TrainedModel, with its adapters and without wrappers of data parallelism.
        texts: see OutputPreservation.
        shape: (C, h, w) of the latents of a square picture.
        with_size_and_crop: see Family.uses_size_and_crop.
    """
    if not recipe.preserves_output:
        return None
    side = float(recipe.model.resolution)
    size_and_crop = torch.tensor([side, side, 0.0, 0.0, side, side]).to(engine.device) if with_size_and_crop else None
    return OutputPreservation(
        base_model(model), schedule, texts, shape, recipe.class_rows, recipe.train.gradient_accumulation_steps,
        recipe.train.seed, engine.device, engine.rank, engine.world_size, size_and_crop=size_and_crop,
        interval=recipe.class_row_interval)
