"""The training step, and the training state that it updates. Here, `step` is the number of completed steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dreambooth.config.recipe import Recipe
from dreambooth.data.batches import Batch
from dreambooth.errors import Diverged
from dreambooth.models.finite import first_not_finite
from dreambooth.models.noise_schedule import NoiseSchedule
from dreambooth.optim.ema import Ema
from dreambooth.optim.optimizers import estimated_step_size
from dreambooth.optim.schedule_free import averaged_weights, is_schedule_free
from dreambooth.optim.streaming_optimizer import StreamingOptimizer
from dreambooth.runtime.async_readback import AsyncReadback
from dreambooth.runtime.engine import Engine
from dreambooth.training.loss import Losses, dreambooth_loss, scheduled_deltas
from dreambooth.training.output_preservation import OutputPreservation

if TYPE_CHECKING:
    from dreambooth.optim.fully_shard import FullyShardedModel

MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class History:
    """What a run has measured so far that decides when it ends; saved with each checkpoint.

    Only steps that are multiples of train.validate_every or evaluate.every are recorded, so that an extended run has
    the same history as a run that had the larger number of steps from the start.
    """

    scores: dict[int, dict[str, float]] = field(default_factory=dict)  # values of measures, by step and name
    loss_sum: float = 0.0  # sum of the instance losses of the steps since the last validation
    loss_count: int = 0  # number of these steps

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of measures after `step` completed steps."""
        self.scores.setdefault(step, {}).update(values)


@dataclass
class TrainState:
    """The training state: everything that training changes. All other objects can be rebuilt from the recipe."""

    model: nn.Module  # (latents, timesteps, text[, size_and_crop]) -> prediction; may be wrapped for data parallel
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: Ema | None = None
    step: int = 0  # completed steps
    skipped: int = 0  # fp16 steps that the loss scaler skipped, in total
    skipped_in_row: int = 0  # fp16 steps skipped since the last step that was not skipped
    history: History = field(default_factory=History)
    samples_per_step: int | None = None  # photos of a step, over all processes; None: unknown
    after_step: Callable[[int], None] | None = None  # changes weights after the n-th step that was not skipped
    sharded: "FullyShardedModel | None" = None  # with memory.fully_shard
    _checked_step: int = 0  # the step after which `check_finite` was called last

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the trained weights by name, in the precision in which they are trained.

        With memory.fully_shard, the tensors are this process's part of the weights.

        Args:
            model: the trained module itself, unwrapped.
        """
        if self.sharded is not None:
            return self.sharded.weights()
        if isinstance(self.optimizer, StreamingOptimizer):
            return self.optimizer.weights()
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    @cached_property
    def trained_parameters(self) -> list[nn.Parameter]:
        """The trained parameters. They are listed once, because a model has many modules."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def averages(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Return the averages of the trained weights, by name, with which the run samples, evaluates and exports.

        They are those of the EMA, or of schedule-free AdamW. None: the run has no averages.

        Args:
            model: the trained module itself, unwrapped.
        """
        weights = self.weights(model)
        if self.ema is not None:
            return self.ema.current(weights)
        return averaged_weights(self.optimizer, weights) if is_schedule_free(self.optimizer) else None

    def check_finite(self, model: nn.Module) -> None:
        """Check that the trained weights and the EMA weights are finite.

        Call this before the weights are saved or exported, or before samples are generated with them.

        If a step makes weights that are not finite, the loss of the next step is not finite either, and
        `StepInfo.check` notices it. The last step has no next step, so only this method checks its weights. A second
        call after the same step does nothing.

        Args:
            model: the trained module itself, unwrapped.

        Raises:
            Diverged: a value is NaN or infinite.
        """
        if self._checked_step == self.step:
            return
        average = self.ema.average if self.ema is not None else {}
        name = first_not_finite(self.weights(model)) or first_not_finite(average)
        if self.sharded is not None and self.sharded.engine.reduce_flag(name is not None).read()[0]:
            name = name or "of another process"
        if name:
            raise Diverged(divergence_message(f"after step {self.step}, the weight {name} is not finite"))
        self._checked_step = self.step


@dataclass(frozen=True)
class Objective:
    """The training objective: the DreamBooth loss of a model's prediction for a noised batch.

    At most one of `snr_gamma` and `debiased` is set.
    """

    noise_schedule: NoiseSchedule
    prior_loss_weight: float = 1.0
    snr_gamma: float | None = None  # gamma of Min-SNR weighting; None: all timesteps have the same weight
    split_prior: bool = False  # run forward and backward of the instance rows first, then those of the class rows
    preservation: OutputPreservation | None = None  # adds the class rows; None: the batches have them, if any
    debiased: bool = False  # weights of debiased estimation
    huber_delta: float | None = None  # delta of the scheduled pseudo-Huber loss; None: the squared error

    @classmethod
    def of(cls, recipe: Recipe, noise_schedule: NoiseSchedule, preservation: OutputPreservation | None = None,
           ) -> "Objective":
        """Return the objective of a run."""
        train = recipe.train
        weight = recipe.prior.prior_loss_weight * recipe.class_row_interval  # fewer steps with class rows weigh more
        return cls(noise_schedule, weight, train.snr_gamma, recipe.two_passes, preservation,
                   train.debiased_estimation, train.huber_delta)

    def for_comparison(self) -> "Objective":
        """Return the objective with which runs are compared: squared errors, whose weights are all 1."""
        return Objective(self.noise_schedule.for_comparison(), self.prior_loss_weight)

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Losses:
        """Return the losses of a batch: add noise to its latents, predict, and compare prediction and target."""
        schedule = self.noise_schedule
        noisy = batch.noisy
        if noisy is None:
            noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        times = schedule.denoiser_timesteps(batch.timesteps)
        size_and_crop = () if batch.size_and_crop is None else (batch.size_and_crop,)
        prediction = model(noisy, times, batch.text, *size_and_crop).to(batch.latents.dtype)
        goal = schedule.target(batch.latents, batch.noise, batch.timesteps) if batch.target is None else batch.target
        weights, deltas = self._weights(batch.timesteps), None
        if self.huber_delta is not None:
            deltas = scheduled_deltas(schedule.snr(batch.timesteps), self.huber_delta).to(goal.dtype)
        return dreambooth_loss(prediction, goal, batch.num_instances, self.prior_loss_weight,
                               None if weights is None else weights.to(goal.dtype), batch.mask, deltas)

    def _weights(self, timesteps: Tensor) -> Tensor | None:
        """Return the loss weight of each row, (N,); None: all weights are 1."""
        if self.snr_gamma is not None:
            return self.noise_schedule.min_snr_weights(timesteps, self.snr_gamma)
        if self.debiased:
            return self.noise_schedule.debiased_weights(timesteps)
        return self.noise_schedule.loss_weights(timesteps)


@dataclass(frozen=True)
class StepInfo:
    """The result of one step. Its tensors stay on the device until `numbers` is read."""

    step: int  # completed steps, including this one
    losses: Tensor  # (3,): total, instance, prior; means over micro-batches and processes
    grad_norm: Tensor  # 0-d, before clipping
    learning_rate: float
    images: int  # number of instance and class samples of all processes
    with_prior: bool
    skipped: bool  # the loss scaler skipped the optimizer step
    skipped_in_row: int
    estimated_step_size: float | None = None  # Prodigy's d; None: another optimizer
    text_encoder_learning_rate: float | None = None  # None: train.text_encoder_learning_rate is null

    def start_readback(self) -> None:
        """Start to copy the metrics to the host. The copy waits for this step only, not for later steps."""
        _ = self._readback

    @cached_property
    def _readback(self) -> AsyncReadback:
        return AsyncReadback(torch.cat([self.losses.float(), self.grad_norm.float().view(1)]))

    @cached_property
    def numbers(self) -> dict[str, float]:
        """The metrics of the step, by name. Reading this property waits for the device."""
        loss, instance, prior, norm = self._readback.read()
        metrics = {"loss": loss, "loss_instance": instance, "grad_norm": norm, "learning_rate": self.learning_rate}
        if self.estimated_step_size is not None:
            metrics["effective_learning_rate"] = self.estimated_step_size * self.learning_rate
        if self.text_encoder_learning_rate is not None:
            metrics["text_encoder_learning_rate"] = self.text_encoder_learning_rate
        return metrics | ({"loss_prior": prior} if self.with_prior else {})

    def check(self) -> None:
        """Check that training has not diverged.

        Raises:
            Diverged: the loss or the gradient is not finite, or too many steps in a row were skipped.
        """
        loss, norm = self.numbers["loss"], self.numbers["grad_norm"]
        if not math.isfinite(loss):
            raise Diverged(divergence_message(f"the loss of step {self.step} is {loss}"))
        if not self.skipped and not math.isfinite(norm):
            raise Diverged(divergence_message(f"the gradient of step {self.step} is {norm}"))
        if self.skipped_in_row >= MAX_SKIPPED_IN_A_ROW:
            raise Diverged(divergence_message(f"fp16 gradients overflowed in {self.skipped_in_row} steps in a row, "
                                               f"the last is step {self.step}"))


def divergence_message(reason: str) -> str:
    """Return the error message of a run that diverged: the reason, and what the user can type."""
    return (f"{reason}: the run diverged and was stopped; earlier checkpoints are kept. "
            "Type a lower train.learning_rate, or precision=fp32")


def train_step(
    state: TrainState, batches: Sequence[Batch], objective: Objective, engine: Engine, max_grad_norm: float | None
) -> StepInfo:
    """Perform one training step: average the gradient over micro-batches and processes, clip it, update the weights.

    Then update the learning rate and the EMA, and return the metrics of the step.

    This function reads no values back from the device, so that it also runs on fake tensors.

    Args:
        state: advanced in place.
        batches: the micro-batches of this process. Without Batch.loss_divisor they have the same size.
        max_grad_norm: limit of the global gradient norm; None: no clipping.
    """
    learning_rate, step_size = state.optimizer.param_groups[0]["lr"], estimated_step_size(state.optimizer)
    encoder_rates = [group["lr"] for group in state.optimizer.param_groups if group.get("part") == "text_encoder"]
    if objective.preservation is not None:
        batches = objective.preservation(batches, state.step, engine)
    forward_backward = partial(_forward_backward, state, batches, objective, engine)
    if isinstance(state.optimizer, StreamingOptimizer):
        losses, norm, stepped = state.optimizer.update(forward_backward, engine, max_grad_norm, state.step)
    else:
        losses = forward_backward()
        norm = engine.clip(state.optimizer, state.trained_parameters, max_grad_norm)
        stepped = engine.step(state.optimizer)
        state.optimizer.zero_grad(set_to_none=True)
    losses = engine.all_reduce_mean(losses)
    _advance(state, stepped, engine)
    return StepInfo(
        step=state.step, losses=losses, grad_norm=norm, learning_rate=learning_rate,
        images=round(batches[0].num_samples * _divisor(batches[0], len(batches)) * engine.world_size),
        with_prior=batches[0].with_prior, skipped=not stepped, skipped_in_row=state.skipped_in_row,
        estimated_step_size=step_size,
        text_encoder_learning_rate=encoder_rates[0] if encoder_rates else None)


def _forward_backward(state: TrainState, batches: Sequence[Batch], objective: Objective, engine: Engine) -> Tensor:
    """Accumulate the gradients of the micro-batches. Return the mean losses (total, instance, prior), shape (3,)."""
    all_losses: list[Tensor] = []
    for number, batch in enumerate(batches, start=1):
        divisor = _divisor(batch, len(batches))
        # Gradients are averaged over processes only once, in the backward pass of the last micro-batch.
        with nullcontext() if number == len(batches) else engine.no_sync(state.model):
            if (objective.split_prior and batch.with_prior) or batch.class_batch is not None:
                losses = _forward_backward_halves(state.model, batch, objective, engine, divisor)
            else:
                with engine.autocast():
                    losses = objective(state.model, batch)
                engine.backward(losses.total / divisor)
        prior = torch.zeros_like(losses.total) if losses.prior is None else losses.prior
        values = torch.stack([losses.total, losses.instance, prior]).detach()
        all_losses.append(values if batch.loss_divisor is None else values * (len(batches) / divisor))
    return torch.stack(all_losses).mean(0)


def _divisor(batch: Batch, num_batches: int) -> float:
    """Return the number by which the loss of a micro-batch is divided, see StepShares.loss_divisor."""
    return num_batches if batch.loss_divisor is None else batch.loss_divisor


def _forward_backward_halves(model: nn.Module, batch: Batch, objective: Objective, engine: Engine,
                             divisor: float) -> Losses:
    """Run forward and backward on the instance rows, then on the class rows, so that half as many activations exist
    at a time.

    The gradient of a sum is the sum of the gradients, and each row has its own noise and timestep. In exact arithmetic
    this therefore gives the gradient of the whole batch. In floating point the terms of the rows are added in another
    order. With unit roundoff u (2**-24 in fp32) and n terms per sum, the two results differ by at most
    2 n u * sum |terms| (Higham 2002, eq. 4.4, applied to either order).
    """
    instance_batch, class_batch = batch.halves()
    with engine.no_sync(model):
        with engine.autocast():
            instance = objective(model, instance_batch).instance
        engine.backward(instance / divisor)
    with engine.autocast():
        prior = objective(model, class_batch).instance  # all its rows count as instance rows
    engine.backward(objective.prior_loss_weight * prior / divisor)
    return Losses(instance + objective.prior_loss_weight * prior, instance, prior)


def _advance(state: TrainState, stepped: bool, engine: Engine) -> None:
    """Count the step. A skipped step advances neither the learning rate nor the EMA."""
    state.step += 1
    if not stepped:
        state.skipped += 1
        state.skipped_in_row += 1
        return
    state.skipped_in_row = 0
    state.lr_scheduler.step()
    if state.after_step is not None:
        state.after_step(state.step - state.skipped)
    if state.ema is not None:
        state.ema.update(state.weights(engine.unwrap(state.model)))
