"""What happens after a step besides training: log, sample, save, stop. Each is called with every StepInfo."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dreambooth import checkpoint
from dreambooth.console import Bar
from dreambooth.ema import swapped
from dreambooth.engine import Engine
from dreambooth.errors import Interrupted
from dreambooth.meter import Meter
from dreambooth.recipe import Recipe
from dreambooth.samples import SampleBook
from dreambooth.sent import Sent
from dreambooth.setup import Setup
from dreambooth.signals import Stop
from dreambooth.step import StepInfo
from dreambooth.tracking import Tracker


class Hook(Protocol):
    """Something to do after steps."""

    def due(self, step: int) -> bool:
        """Whether it needs the state after this step, not its numbers alone; asked once, right after the step."""

    def __call__(self, info: StepInfo) -> None:
        """Called with every step; where it was not due, the state may be a step further."""


def due(step: int, every: int | None, last: int) -> bool:
    """True after every n-th completed step and after the last one; never for None."""
    return every is not None and (step % every == 0 or step == last)


@dataclass
class Log:
    """Metrics of every step to the journal and the progress bar."""

    tracker: Tracker
    bar: Bar
    meter: Meter
    _then: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """On a CPU nothing is gained by telling a step late."""
        return self.meter.device.type == "cpu"

    def __call__(self, info: StepInfo) -> None:
        now = time.monotonic()
        rate, self._then = info.images / max(now - self._then, 1e-9), now
        scaled = {"skipped_steps_in_a_row": float(info.skipped_in_row)} if info.skipped else {}
        self.tracker.metrics(info.step, info.numbers | scaled | {"images_per_second": rate} | self.meter.read("step"))
        self.bar.tick(note=f"loss {info.numbers['loss']:.3f}")


@dataclass
class Samples:
    """Pictures every `sample.every` steps, from the EMA weights where there are any."""

    book: SampleBook
    setup: Setup
    engine: Engine
    meter: Meter
    every: int | None
    last: int

    def due(self, step: int) -> bool:
        return due(step, self.every, self.last)

    def __call__(self, info: StepInfo) -> None:
        if self.due(info.step):
            self.now(info.step)

    def now(self, step: int) -> None:
        """Sample after `step` completed steps."""
        with self.meter.phase("sample"), self.setup.idle.present(), averaged(self.setup):
            self.book.add(step, self.setup.pipeline, self.engine.autocast)


@dataclass
class Save:
    """A checkpoint every `checkpoint.every` steps and after the last one."""

    setup: Setup
    engine: Engine
    meter: Meter
    recipe: Recipe

    def due(self, step: int) -> bool:
        spec, last = self.recipe.checkpoint, self.recipe.train.max_train_steps
        return step == last or due(step, spec.every, last)

    def __call__(self, info: StepInfo) -> None:
        if self.due(info.step):
            self.now()

    def now(self) -> Path:
        """Save the state as it is."""
        with self.meter.phase("save"):
            return checkpoint.save(
                self.recipe.run_dir / "checkpoints", self.setup.state, self.setup.trained, self.engine.scaler,
                self.recipe.checkpoint.keep)


@dataclass
class Halt:
    """Saves and stops when somebody asked for it, on all processes after the same step."""

    stop: Stop
    engine: Engine
    save: Save
    _asked: Sent | None = None
    _step: int | None = None  # that everybody stops after

    def due(self, step: int) -> bool:
        """Several processes learn of a request one step late: so they all learn it then, and nobody waits for it."""
        stop = self.stop.requested is not None
        if self.engine.world > 1:
            before, self._asked = self._asked, self.engine.ask(stop)
            stop = before is not None and before.read()[0] > 0
        self._step = step if stop else None
        return stop

    def __call__(self, info: StepInfo) -> None:
        if info.step != self._step:
            return
        if self.engine.main:
            self.save.now()
        raise Interrupted(f"{self.stop.requested or 'another process'}: stopped and saved after step {info.step}; "
                          "repeat the command to go on")


def anyone(hooks: Sequence[Hook]) -> Callable[[int], bool]:
    """Whether anyone needs the state after a step. All are asked each time: a Halt among them counts on it."""
    return lambda step: sum(hook.due(step) for hook in hooks) > 0


def averaged(setup: Setup, exact: bool = False) -> AbstractContextManager[Any]:
    """The EMA weights in place of the live ones for a while, if there is an EMA.

    Args:
        exact: to be written, not computed with: in their own precision, and without an EMA the weights as trained.
    """
    if setup.state.ema is not None:
        return swapped(setup.trained, setup.state.ema.average, exact)
    return swapped(setup.trained, setup.state.weights(setup.trained), exact) if exact else nullcontext()
