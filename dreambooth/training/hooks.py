"""What happens after a step besides training: log, sample, save, measure. Each is called with every StepInfo."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dreambooth.config import evaluate
from dreambooth.config.recipe import Recipe
from dreambooth.evaluation.evaluator import Evaluation
from dreambooth.models import loading, lora
from dreambooth.models.pipeline import build_pipeline
from dreambooth.optim.ema import swap_weights
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.tracking.tracker import Tracker
from dreambooth.training import best_weights, checkpoint
from dreambooth.training.sample_images import SampleBook
from dreambooth.training.setup import Setup
from dreambooth.training.step import StepInfo
from dreambooth.utils.console import Bar
from dreambooth.utils.signals import StopRequest

log = logging.getLogger(__name__)


class Hook(Protocol):
    """Something to do after steps."""

    def due(self, step: int) -> bool:
        """Whether it needs the state after this step, not its numbers alone; asked once, right after the step."""

    def __call__(self, info: StepInfo) -> None:
        """Called with every step; where it was not due, the state may be a step further."""


class All:
    """Hooks as one. Each is asked whether it is due: a Halt among them counts on it."""

    def __init__(self, hooks: Sequence[Hook], *more: Hook) -> None:
        self.hooks = [*hooks, *more]

    def due(self, step: int) -> bool:
        return sum(hook.due(step) for hook in self.hooks) > 0

    def __call__(self, info: StepInfo) -> None:
        for hook in self.hooks:
            hook(info)


def due(step: int, every: int | None, last: int) -> bool:
    """True after every n-th completed step and after the last one; never for None."""
    return every is not None and (step % every == 0 or step == last)


def due_or_last(step: int, every: int | None, last: int) -> bool:
    """The same, and after the last step for None too."""
    return step == last or due(step, every, last)


@dataclass
class Log:
    """Metrics of every step to the journal and the progress bar."""

    tracker: Tracker
    bar: Bar
    meter: MemoryMeter
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
    meter: MemoryMeter
    every: int | None
    last: int

    def due(self, step: int) -> bool:
        return due(step, self.every, self.last)

    def __call__(self, info: StepInfo) -> None:
        if self.due(info.step):
            self.now(info.step)

    def now(self, step: int) -> None:
        """Sample after `step` completed steps."""
        with self.meter.phase("sample"), self.setup.idle.on_device(), averaged(self.setup):
            self.book.add(step, self.setup.pipeline, self.engine.autocast)


@dataclass
class Save:
    """A checkpoint every `checkpoint.every` steps and after the last one."""

    setup: Setup
    engine: Engine
    meter: MemoryMeter
    recipe: Recipe

    def due(self, step: int) -> bool:
        spec, last = self.recipe.checkpoint, self.recipe.train.max_train_steps
        return due_or_last(step, spec.every, last)

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
class Measure:
    """Scores every `evaluate.every` steps and after the last; keeps the best weights so far.

    Called after Save: should the process die in here, a checkpoint of this step is there, and `begin` measures it.
    The base is measured before the first of them, from a copy of its own: nobody waits for it before the first step.
    Not so on a card, where a second model beside the optimizer's state may not fit: there it is measured before the
    first step, when the live weights still are the base.
    """

    evaluation: Evaluation | None  # None: no evaluation
    setup: Setup
    engine: Engine
    meter: MemoryMeter
    recipe: Recipe
    stop: StopRequest

    def due(self, step: int) -> bool:
        spec, last = self.recipe.evaluate, self.recipe.train.max_train_steps
        return due_or_last(step, spec.every, last)

    def __call__(self, info: StepInfo) -> None:
        if self.due(info.step):
            self.now(info.step)

    def begin(self) -> None:
        """Measure the step that a run begins with: of a resumed one, if it is to be measured and is not yet; on a card,
        the base."""
        step = self.setup.state.step
        if step == 0 and self.evaluation is not None and self.engine.device.type == "cuda":
            with self.meter.phase("evaluate"), self.setup.idle.on_device(), averaged(self.setup):
                self._measure(0, self.setup.pipeline)
        elif step > 0 and self.due(step):
            self.now(step)

    def now(self, step: int) -> None:
        """Measure the base, unless that was done, then the state after `step` completed steps."""
        if self.evaluation is None:
            return
        every = self.recipe.evaluate.every
        with self.meter.phase("evaluate"), self.setup.idle.on_device():
            if 0 not in self.evaluation.scores():
                with self._base() as pipeline:
                    self._measure(0, pipeline)
            with averaged(self.setup):
                measured = self._measure(step, self.setup.pipeline)
            if measured and every and step % every == 0 and step == self.best(step):
                with averaged(self.setup, exact=True):
                    best_weights.keep(self.kept, step, self.setup.trained)

    @property
    def kept(self) -> Path:
        """Folder of the best weights."""
        return self.recipe.run_dir / "best"

    def best(self, last: int) -> int | None:
        """The best measured step up to `last`; None where nothing selects."""
        spec = self.recipe.evaluate
        if self.evaluation is None or spec.select is None or spec.every is None:
            return None
        weights = evaluate.parse_sum(spec.select, self.recipe.measure_roles)
        return best_weights.best_step(self.evaluation.scores(), weights, spec.every, last)

    @contextmanager
    def exported(self, exact: bool = False) -> Iterator[int]:
        """The weights to export in place of the live ones: the best, else the last; yields their step.

        Args:
            exact: to be written, not computed with (see `averaged`).
        """
        step = self.setup.state.step
        chosen = self.best(step) or step
        if chosen != step and best_weights.kept_step(self.kept) != chosen:
            log.warning("step %d is the best and its weights are not in %s any more: step %d is exported",
                        chosen, self.kept, step)
            chosen = step
        last = averaged(self.setup, exact)
        with last if chosen == step else best_weights.swapped_into(self.kept, self.setup.trained, exact):
            yield chosen

    def scores(self, step: int) -> dict[str, float]:
        """What was measured after `step` steps; empty: nothing."""
        return self.evaluation.scores().get(step, {}) if self.evaluation else {}

    @contextmanager
    def _base(self) -> Iterator[Any]:
        """A pipeline of the base. On a card a resumed run has its base's weights in place of the live ones, one by one:
        these wait in host memory, so that the card holds no second model."""
        if self.recipe.method.low_rank:
            with lora.absent(self.setup.trained):
                yield self.setup.pipeline
            return
        if self.engine.device.type != "cuda":
            yield build_pipeline(loading.load(self.recipe, self.engine.device))
            return
        parts = loading.load(self.recipe, torch.device("cpu"))
        base = loading.denoiser_of(parts, self.recipe)
        with swap_weights(self.setup.trained, dict(base.named_parameters())):
            yield self.setup.pipeline

    def _measure(self, step: int, pipeline: Any) -> bool:
        """False: somebody asked to stop meanwhile, and nothing was kept."""
        assert self.evaluation is not None
        return self.evaluation.measure(
            step, pipeline, self.engine.autocast, lambda: self.stop.signal_name is not None) is not None


def averaged(setup: Setup, exact: bool = False) -> AbstractContextManager[Any]:
    """The EMA weights in place of the live ones for a while, if there is an EMA.

    Args:
        exact: to be written, not computed with: in their own precision, and without an EMA the weights as trained.
    """
    if setup.state.ema is not None:
        return swap_weights(setup.trained, setup.state.ema.average, exact)
    return swap_weights(setup.trained, setup.state.weights(setup.trained), exact) if exact else nullcontext()
