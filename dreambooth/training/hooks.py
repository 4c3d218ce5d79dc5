"""Hooks, which are called after every training step: logging, sampling and checkpoints.

EvaluationHook is in evaluation_hook.py, StopHook in stop_hook.py. Each hook is called with the StepInfo of every step.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dreambooth.config.recipe import Recipe
from dreambooth.errors import Interrupted
from dreambooth.optim.ema import swap_weights
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.tracking.tracker import Tracker
from dreambooth.training import checkpoint
from dreambooth.training.sample_images import SampleRecorder
from dreambooth.training.setup import Setup
from dreambooth.training.step import StepInfo
from dreambooth.utils.console import Bar
from dreambooth.utils.signals import StopRequest


class Hook(Protocol):
    """The interface of a hook, which is called after every training step."""

    def due(self, step: int) -> bool:
        """Return whether the hook needs the training state after this step, not only the StepInfo.

        This method is called once per step, right after the step was started.
        """

    def __call__(self, info: StepInfo) -> None:
        """Process the result of a step. The hook is called once per step, in order.

        If the hook was not due, the training state may already include the next step.
        """


class HookList:
    """A hook that calls several hooks in order."""

    def __init__(self, hooks: Sequence[Hook], *more: Hook) -> None:
        self.hooks = [*hooks, *more]

    def due(self, step: int) -> bool:
        """Return whether one of the hooks is due.

        `due` of every hook is called, even after one returned True, because StopHook needs this call after each step.
        """
        return sum(hook.due(step) for hook in self.hooks) > 0

    def __call__(self, info: StepInfo) -> None:
        for hook in self.hooks:
            hook(info)


def is_due(step: int, every: int | None, last: int) -> bool:
    """Return whether `step` is a multiple of `every`, or the last step; False if `every` is None."""
    return every is not None and (step % every == 0 or step == last)


def is_due_or_last(step: int, every: int | None, last: int) -> bool:
    """Return whether `step` is a multiple of `every`, or the last step, which is due even if `every` is None."""
    return step == last or is_due(step, every, last)


@dataclass
class LogHook:
    """Writes the metrics of every step to the tracker, and the loss to the progress bar."""

    tracker: Tracker
    bar: Bar
    meter: MemoryMeter
    note: Callable[[], str] = lambda: ""  # text that follows the loss
    _last_call: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Return True on a CPU, so that the metrics of a step are logged before the next step starts.

        On a GPU, return False, because reading the metrics one step later saves time.
        """
        return self.meter.device.type == "cpu"

    def __call__(self, info: StepInfo) -> None:
        now = time.monotonic()
        rate, self._last_call = info.images / max(now - self._last_call, 1e-9), now
        skipped = {"skipped_steps_in_a_row": float(info.skipped_in_row)} if info.skipped else {}
        metrics = info.numbers | skipped | {"images_per_second": rate} | self.meter.read("step")
        self.tracker.log_metrics(info.step, metrics)
        self.bar.tick(note=f"loss {info.numbers['loss']:.3f}{self.note()}")


@dataclass
class SampleHook:
    """Generates samples every `sample.every` steps and after the last one, with the EMA weights if there is an EMA.

    All processes generate samples. The hook is called after CheckpointHook, so that a checkpoint that is due never
    waits for pictures. If the run is stopped or killed while samples are generated, `before_training` of the resumed
    run generates them.
    """

    recorder: SampleRecorder
    setup: Setup
    engine: Engine
    meter: MemoryMeter
    recipe: Recipe
    stop: StopRequest

    def due(self, step: int) -> bool:
        return is_due(step, self.recipe.sample.every, self.recipe.train.max_train_steps)

    def __call__(self, info: StepInfo) -> None:
        if self.due(info.step):
            self.sample(info.step)

    def before_training(self) -> None:
        """Generate the samples that are due before the first step of this process.

        They are the samples of step 0, or of the step from which the run resumes.
        """
        if self.due(self.setup.state.step):
            self.sample(self.setup.state.step)

    def sample(self, step: int) -> None:
        """Generate the samples of the state after `step` completed steps. If a stop is requested, write nothing."""
        with self.meter.phase("sample"), self.setup.idle.on_device(), swap_in_ema(self.setup), suppress(Interrupted):
            self.recorder.record(step, self.setup.pipeline, self.engine, self.stop)


@dataclass
class CheckpointHook:
    """Saves a checkpoint every `checkpoint.every` steps and after the last one.

    Attributes:
        saved_step: the step of the last checkpoint that was saved or loaded; None: there is none.
    """

    setup: Setup
    engine: Engine
    meter: MemoryMeter
    recipe: Recipe
    saved_step: int | None = None

    @property
    def takes_part(self) -> bool:
        """Whether this process calls `save`: the main process; with memory.fully_shard, all of them."""
        return self.engine.is_main_process or self.setup.state.sharded is not None

    def due(self, step: int) -> bool:
        return is_due_or_last(step, self.recipe.checkpoint.every, self.recipe.train.max_train_steps)

    def __call__(self, info: StepInfo) -> None:
        if self.due(info.step):
            self.save()

    def save(self) -> None:
        """Save the current state, unless it was saved or loaded already."""
        state = self.setup.state
        if state.step == self.saved_step:
            return
        with self.meter.phase("save"):
            state.check_finite(self.setup.trained)
            checkpoint.save(self.recipe.run_dir / "checkpoints", state, self.setup.trained, self.engine.scaler,
                            self.recipe.checkpoint.keep)
        self.saved_step = state.step


def swap_in_ema(setup: Setup, exact: bool = False) -> AbstractContextManager[Any]:
    """Put the EMA weights into the trained module in a `with` block. On exit, restore the module's own weights.

    With optimizer=schedule_free, put in the optimizer's averages. If the run has no averages, the module contains the
    trained weights inside the block, too.

    With memory.fully_shard this is a collective operation, until `keep_result` is called.

    Args:
        exact: True: the weights keep the precision in which they are trained or averaged, so that they can be written
            to a file. False: they have the precision of the module, so that the module can compute with them.

    Raises:
        Diverged: a trained weight or an EMA weight is not finite.
    """
    if exact or setup.state.sharded is not None:
        return swap_weights(setup.trained, result_weights(setup), exact)
    setup.state.check_finite(setup.trained)
    averages = setup.state.averages(setup.trained)
    return nullcontext() if averages is None else swap_weights(setup.trained, averages)


def result_weights(setup: Setup) -> dict[str, Tensor]:
    """Return the weights that the run would export now, by name, in the precision of training or of the averages.

    With memory.fully_shard this is a collective operation, until `keep_result` is called.

    Raises:
        Diverged: a trained weight or an EMA weight is not finite.
    """
    setup.state.check_finite(setup.trained)
    weights = _result(setup)
    return weights if setup.state.sharded is None else setup.state.sharded.gathered(weights)


def keep_result(setup: Setup) -> None:
    """With memory.fully_shard, give the main process the whole weights of the last step, to export them alone."""
    if setup.state.sharded is not None:
        setup.state.check_finite(setup.trained)
        setup.state.sharded.store_result(_result(setup))


def _result(setup: Setup) -> dict[str, Tensor]:
    """Return the averages of the trained weights, by name; if there are none, the trained weights."""
    averages = setup.state.averages(setup.trained)
    return setup.state.weights(setup.trained) if averages is None else averages
