"""Measures the loss on held-out photos, which a run does not train on, every `train.validate_every` steps.

The curve of this loss has no sampling noise: each photo always has the same noise and timesteps. The held-out loss
falls as long as the model learns what all photos of the subject have in common, and rises when the model memorises the
photos that it trains on (Prechelt 1998, "Early stopping - but when?", section 1).
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dreambooth.config.evaluate import VALIDATION_LOSS
from dreambooth.config.recipe import Recipe
from dreambooth.data.photo_set import PhotoSet, View
from dreambooth.errors import Diverged
from dreambooth.models.pipeline import evaluating
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.tracking.tracker import Tracker
from dreambooth.training.hooks import is_due, swap_in_ema
from dreambooth.training.setup import Setup
from dreambooth.training.step import StepInfo, divergence_message
from dreambooth.utils import rng

log = logging.getLogger(__name__)
DRAWS = 8  # noisy copies of each photo, with one timestep in each of 8 equal parts of the noise schedule
TRAINING_LOSS = "training_loss"  # name in the history: mean instance loss of the steps since the last validation
TURN = 3  # measurements in a row above the lowest one, after which the held-out loss counts as rising
TURN_MARGIN = 0.01  # fraction of the lowest value by which they must exceed it


def validation_loss(setup: Setup, photo_set: PhotoSet, engine: Engine) -> float:
    """Return the mean loss of the held-out photos with the weights that the trained module has now.

    The loss is the instance term of the training objective, with its weights of timesteps, its masks and its offset
    noise. Draw d of photo i has the noise of the key ("validation", i, d) and a timestep in part d of DRAWS equal parts
    of the noise schedule. These numbers depend neither on train.seed nor on the step. Photos are cropped at the centre,
    and never mirrored; dropout is off.

    The rows of one photo pass through the model in chunks of at most train.train_batch_size, so that a validation needs
    no more memory than a training step. The processes share the photos. The values of the photos are added in the same
    order for every number of processes. A collective operation: every process must call it.

    Raises:
        Diverged: the loss is not finite.
    """
    batches, length = setup.batches, setup.objective.noise_schedule.length
    own: list[tuple[int, float]] = []
    # Call `forward`, because calling the module would compile it for another shape, which takes minutes.
    with torch.no_grad(), evaluating(setup.trained):
        for number in range(engine.rank, len(photo_set.photos), engine.world_size):
            total = 0.0
            for first in range(0, DRAWS, batches.batch_size):
                draws = range(first, min(first + batches.batch_size, DRAWS))
                samples = batches.draw_views(
                    photo_set, [View(number, False, None)] * len(draws),
                    [("validation", number, draw) for draw in draws],
                    [_timestep(number, draw, length) for draw in draws])
                with engine.autocast():
                    losses = setup.objective(setup.trained.forward, batches.make_batch(photo_set, samples, True))
                total += float(losses.instance) * len(draws)
            own.append((number, total / DRAWS))
    values = [value for _, value in sorted(engine.gather(own))]
    mean = math.fsum(values) / len(values)
    if not math.isfinite(mean):
        raise Diverged(divergence_message(f"the loss of the held-out photos after step {setup.state.step} is {mean}"))
    return mean


def _timestep(number: int, draw: int, length: int) -> int:
    """Return a random timestep in part `draw` of DRAWS equal parts of a noise schedule of `length` timesteps."""
    low, high = (part * length // DRAWS for part in (draw, draw + 1))
    return low + int(rng.stream("validation", number, draw, "timestep").integers(high - low))


def turned_up(history: Mapping[int, Mapping[str, float]], step: int) -> int | None:
    """Return the step with the lowest held-out loss, if the loss has turned upwards at `step` and not before.

    The loss has turned upwards if the last TURN measurements exceed the lowest earlier one by more than TURN_MARGIN,
    and the training loss has kept falling: its mean over the steps between these measurements is lower than its mean
    over the steps before the lowest one, as far as TURN measurements back. Step 0, the base model, does not count.

    Args:
        history: VALIDATION_LOSS and TRAINING_LOSS by step.
    """
    steps = sorted(number for number, values in history.items() if 0 < number <= step and VALIDATION_LOSS in values)
    turns = [number for count, number in enumerate(steps, start=1) if _rises(history, steps[:count])]
    if not turns or turns[0] != step:
        return None
    return min(steps, key=lambda number: history[number][VALIDATION_LOSS])


def _rises(history: Mapping[int, Mapping[str, float]], steps: list[int]) -> bool:
    earlier, last = steps[:-TURN], steps[-TURN:]
    if not earlier:
        return False
    lowest = min(earlier, key=lambda number: history[number][VALIDATION_LOSS])
    limit = history[lowest][VALIDATION_LOSS] * (1 + TURN_MARGIN)
    before = [number for number in earlier if number <= lowest][-TURN:]
    means = [sum(history[number].get(TRAINING_LOSS, math.nan) for number in some) / len(some)
             for some in (before, last)]
    return all(history[number][VALIDATION_LOSS] > limit for number in last) and means[1] < means[0]


@dataclass
class ValidationHook:
    """Measures the held-out loss of the base model, every `train.validate_every` steps, and after the last step.

    The weights are those that the run would export after this step: the EMA weights, if there is an EMA. The hook is
    called before CheckpointHook, so that the checkpoint of a step contains the value.
    """

    setup: Setup
    engine: Engine
    meter: MemoryMeter
    recipe: Recipe
    tracker: Tracker
    values: dict[int, float] = field(default_factory=dict)  # by step; the last step of a run is not in the history

    def due(self, step: int) -> bool:
        return self.setup.held_out is not None and is_due(
            step, self.recipe.train.validate_every, self.recipe.train.max_train_steps)

    def __call__(self, info: StepInfo) -> None:
        if self.setup.held_out is not None:
            self.setup.state.history.loss_sum += info.numbers["loss_instance"]
            self.setup.state.history.loss_count += 1
        if self.due(info.step):
            self.measure(info.step)

    def before_training(self) -> None:
        """Take over the values of a checkpoint. Measure the state of this step, if that is due and was not done."""
        history, step = self.setup.state.history.scores, self.setup.state.step
        self.values |= {number: values[VALIDATION_LOSS] for number, values in history.items()
                        if VALIDATION_LOSS in values}
        for number, value in self.values.items():
            self.tracker.log_metrics(number, {VALIDATION_LOSS: value})
        if self.due(step):
            self.measure_once(step)

    def measure_once(self, step: int) -> None:
        """Measure the held-out loss of the state after `step` completed steps, if that is possible and was not done."""
        if self.recipe.validates and self.setup.held_out is not None and step not in self.values:
            self.measure(step)

    def measure(self, step: int) -> None:
        """Measure and track the held-out loss of the state after `step` completed steps."""
        photo_set, history, every = self.setup.held_out, self.setup.state.history, self.recipe.train.validate_every
        assert photo_set is not None and every is not None
        with self.meter.phase("validation"), swap_in_ema(self.setup):
            value = validation_loss(self.setup, photo_set, self.engine)
        self.values[step] = value
        self.tracker.log_metrics(step, {VALIDATION_LOSS: value})
        if step % every == 0:
            training = {TRAINING_LOSS: history.loss_sum / history.loss_count} if history.loss_count else {}
            history.record(step, {VALIDATION_LOSS: value} | training)
            history.loss_sum, history.loss_count = 0.0, 0
            if (lowest := turned_up(history.scores, step)) is not None and self.engine.is_main_process:
                log.warning("the loss on held-out photos rises since step %d while the training loss falls: the run "
                            "begins to memorise its photos", lowest)

    @property
    def note(self) -> str:
        """The latest value, for the progress bar; "" if nothing was measured."""
        return f", validation {self.values[max(self.values)]:.3f}" if self.values else ""
