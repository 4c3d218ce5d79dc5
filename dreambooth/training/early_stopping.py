"""Early stopping: ends a run before train.max_train_steps when a measure no longer improves, or reaches a bound."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dreambooth.config.enums import Direction
from dreambooth.config.evaluate import parse_measure, weighted_sum
from dreambooth.config.recipe import Recipe
from dreambooth.config.schema import StopWhen
from dreambooth.runtime.engine import Engine
from dreambooth.training.evaluation_hook import EvaluationHook
from dreambooth.training.hooks import CheckpointHook, SampleHook
from dreambooth.training.setup import Setup
from dreambooth.training.step import StepInfo
from dreambooth.utils.plurals import counted


def reason_to_stop(rule: StopWhen, mode: Direction, values: Mapping[int, float]) -> str | None:
    """Return why a run ends after the last measurement, or None if it goes on.

    The patience rule is that of PyTorch Lightning's callback EarlyStopping: a value is an improvement if it is better
    than the best one so far by more than min_delta, and the run ends after `patience` measurements in a row that are
    none. The bound ends the run as soon as a value is equal to it, or beyond it in the direction `mode`. A value that
    is not finite is no improvement.

    Args:
        mode: the direction of an improvement.
        values: the values so far, by step; the last step is the one after which the run ends or goes on.
    """
    sign = 1 if mode is Direction.max else -1
    best, best_at, waited = -math.inf, 0, 0
    for step in sorted(values):
        value = sign * values[step]
        if value - rule.min_delta > best:
            best, best_at, waited = value, step, 0
        else:
            waited += 1
    last = values[max(values)] if values else math.nan
    name = rule.measure
    if rule.bound is not None and sign * last >= sign * rule.bound:
        return f"{name} is {last:.4g}, and train.stop_when.bound is {rule.bound:g}"
    if rule.patience is not None and waited >= rule.patience:
        best_text = f"the best was {sign * best:.4g} at step {best_at}" if best_at else "none was finite"
        return f"{name} has not improved in {counted(waited, 'measurement')}: {best_text}"
    return None


@dataclass
class EarlyStopping:
    """Hook that decides after each measurement of train.stop_when.measure whether the run ends.

    The decision is a function of the measured values, which are in each checkpoint. A run that is killed and repeated
    therefore decides the same. The hook is called after the hooks that measure. The step after which the run ends is
    treated as its last step, with a checkpoint, samples, an evaluation and the loss on held-out photos.
    """

    setup: Setup
    engine: Engine
    recipe: Recipe
    saving: CheckpointHook
    sampling: SampleHook
    evaluation: EvaluationHook
    reason: str | None = None  # why the run ends early; None: it does not

    def __post_init__(self) -> None:
        rule = self.recipe.train.stop_when
        self._weights: dict[str, float] = {}
        self._mode = Direction.max
        if rule.measure is not None:
            self._weights, self._mode = parse_measure(rule.measure, self.recipe.measure_roles)
            self._mode = rule.mode or self._mode

    def due(self, step: int) -> bool:
        return False  # the hooks that measure are due

    def __call__(self, info: StepInfo) -> None:
        self.check(info.step)

    def before_training(self) -> None:
        """Decide again after the step from which the run resumes."""
        self.check(self.setup.state.step)

    def reached(self) -> bool:
        """Return whether the run ends before train.max_train_steps."""
        return self.reason is not None

    def check(self, step: int) -> None:
        """Decide whether the run ends after `step`. If it does, save, sample and evaluate the state after this step."""
        values = self._values(step)
        if not self._weights or step not in values or step >= self.recipe.train.max_train_steps:
            return
        self.reason = reason_to_stop(self.recipe.train.stop_when, self._mode, values)
        if self.reason is None:
            return
        if self.engine.is_main_process:
            self.saving.save()
        if self.recipe.sample.every is not None:
            self.sampling.sample(step)
        self.evaluation.evaluate(step)
        self.evaluation.validation.measure_once(step)

    def _values(self, last: int) -> dict[int, float]:
        """Return the value of the measure after each step up to `last` at which all of its terms were measured.

        The base model, step 0, does not count.
        """
        return {step: weighted_sum(self._weights, scores)
                for step, scores in self.setup.state.history.scores.items()
                if 0 < step <= last and self._weights.keys() <= scores.keys()}
