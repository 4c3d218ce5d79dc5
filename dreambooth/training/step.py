"""One training step, and the state that it advances. `state.step` counts completed steps."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from dreambooth.data.batch import Batch
from dreambooth.errors import Diverged
from dreambooth.models.noise_schedule import Schedule, add_noise, min_snr_weights, target
from dreambooth.optim.ema import Ema
from dreambooth.optim.streaming_optimizer import StreamingOptimizer
from dreambooth.runtime.async_readback import AsyncReadback
from dreambooth.runtime.engine import Engine
from dreambooth.training.loss import Losses, dreambooth_loss

MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class TrainState:
    """Everything that training changes. What is not here is a function of the recipe."""

    model: nn.Module  # (latents, timesteps, text) -> prediction; perhaps wrapped for data parallel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: Ema | None = None
    step: int = 0
    skipped: int = 0  # fp16 steps that the loss scaler skipped, ever
    skipped_in_row: int = 0

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained weights of `model`, unwrapped, by name, in the precision in which they are trained."""
        if isinstance(self.optimizer, StreamingOptimizer):
            return self.optimizer.weights()
        return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Objective:
    """How a prediction is judged."""

    noise_schedule: Schedule
    prior_loss_weight: float = 1.0
    snr_gamma: float | None = None
    split_prior: bool = False  # forward and backward of the two halves of a batch one after the other

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Losses:
        """Noise the batch, predict, compare."""
        noisy = add_noise(batch.latents, batch.noise, batch.timesteps, self.noise_schedule)
        prediction = model(noisy, batch.timesteps, batch.text).to(batch.latents.dtype)
        goal = target(batch.latents, batch.noise, batch.timesteps, self.noise_schedule)
        weights = None if self.snr_gamma is None else min_snr_weights(
            batch.timesteps, self.snr_gamma, self.noise_schedule).to(goal.dtype)
        return dreambooth_loss(prediction, goal, batch.instances, self.prior_loss_weight, weights, batch.mask)


@dataclass(frozen=True)
class StepInfo:
    """What happened in a step; `step` counts completed steps, this one included. Its tensors stay on the device."""

    step: int
    losses: Tensor  # (3,): total, instance, prior; means over micro-batches and processes
    grad_norm: Tensor  # 0-d, before clipping
    learning_rate: float
    images: int  # instance and class samples, all processes
    with_prior: bool
    skipped: bool  # the loss scaler skipped the optimizer
    skipped_in_row: int

    def send(self) -> None:
        """Begin to copy the numbers to the host: behind the work of this step, not behind that of later ones."""
        _ = self._sent

    @cached_property
    def _sent(self) -> AsyncReadback:
        return AsyncReadback(torch.cat([self.losses.float(), self.grad_norm.float().view(1)]))

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Metrics by name, read from the device once."""
        loss, instance, prior, norm = self._sent.read()
        metrics = {"loss": loss, "loss_instance": instance, "grad_norm": norm, "learning_rate": self.learning_rate}
        return metrics | ({"loss_prior": prior} if self.with_prior else {})

    def checked(self) -> "StepInfo":
        """Itself, once it is checked."""
        self.check()
        return self

    def check(self) -> None:
        """Raise Diverged if this step shows that training is broken."""
        found = self.numbers
        if not math.isfinite(found["loss"]):
            raise Diverged(_advice(f"the loss of step {self.step} is {found['loss']}"))
        if not self.skipped and not math.isfinite(found["grad_norm"]):
            raise Diverged(_advice(f"the gradient of step {self.step} is {found['grad_norm']}"))
        if self.skipped_in_row >= MAX_SKIPPED_IN_A_ROW:
            raise Diverged(_advice(f"fp16 gradients overflowed in {self.skipped_in_row} steps in a row, "
                                   f"the last is step {self.step}"))


def train_step(
    state: TrainState, batches: Sequence[Batch], objective: Objective, engine: Engine, max_grad_norm: float | None
) -> StepInfo:
    """Average the gradient over `batches` and over processes, clip it, step optimizer, schedule and EMA.

    Nothing is read back from the device here, so the same code runs on fake tensors.
    """
    learning_rate = state.optimizer.param_groups[0]["lr"]
    run = partial(_accumulate, state, batches, objective, engine)
    if isinstance(state.optimizer, StreamingOptimizer):
        losses, norm, taken = state.optimizer.update(run, engine, max_grad_norm, state.step)
    else:
        losses = run()
        norm = engine.clip(state.optimizer, [p for p in state.model.parameters() if p.requires_grad], max_grad_norm)
        taken = engine.step(state.optimizer)
        state.optimizer.zero_grad(set_to_none=True)
    losses = engine.all_reduce_mean(losses)
    _advance(state, taken, engine)
    return StepInfo(
        step=state.step, losses=losses, grad_norm=norm, learning_rate=learning_rate,
        images=sum(batch.count for batch in batches) * engine.world_size, with_prior=batches[0].with_prior,
        skipped=not taken, skipped_in_row=state.skipped_in_row)


def _accumulate(state: TrainState, batches: Sequence[Batch], objective: Objective, engine: Engine) -> Tensor:
    """Add up the gradients of equal micro-batches; returns the means of (total, instance, prior), shape (3,)."""
    seen: list[Tensor] = []
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else engine.no_sync(state.model):
            if (objective.split_prior and batch.with_prior) or batch.apart is not None:
                losses = _halves(state.model, batch, objective, engine, len(batches))
            else:
                with engine.autocast():
                    losses = objective(state.model, batch)
                engine.backward(losses.total / len(batches))
        prior = torch.zeros_like(losses.total) if losses.prior is None else losses.prior
        seen.append(torch.stack([losses.total, losses.instance, prior]).detach())
    return torch.stack(seen).mean(0)


def _halves(model: nn.Module, batch: Batch, objective: Objective, engine: Engine, batches: int) -> Losses:
    """Forward and backward of the instance rows, then of the class rows.

    The gradient of a sum is the sum of gradients, and a row's noise and timestep are its own: with exact numbers it is
    that of the whole batch. In floating point the rows' terms are added in another order. With u the unit roundoff
    (2**-24 in fp32) and n terms a sum, |difference| <= 2 n u * sum |terms| (Higham 2002, eq. 4.4, for either order).
    """
    of_subject, of_class = batch.halves()
    with engine.no_sync(model):
        with engine.autocast():
            instance = objective(model, of_subject).instance
        engine.backward(instance / batches)
    with engine.autocast():
        prior = objective(model, of_class).instance
    engine.backward(objective.prior_loss_weight * prior / batches)
    return Losses(instance + objective.prior_loss_weight * prior, instance, prior)


def _advance(state: TrainState, taken: bool, engine: Engine) -> None:
    state.step += 1
    if not taken:
        state.skipped += 1
        state.skipped_in_row += 1
        return
    state.skipped_in_row = 0
    state.schedule.step()
    if state.ema is not None:
        state.ema.update(state.weights(engine.unwrap(state.model)))


def _advice(what: str) -> str:
    return (f"{what}: the run diverged and was stopped; earlier checkpoints are kept. "
            "Type a lower train.learning_rate, or precision=fp32")
