"""Early stopping: ends a run before train.max_train_steps when a measure no longer improves, or reaches a bound.

A search over several runs may end a run early, too (pruning).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dreambooth.config.enums import Direction
from dreambooth.config.evaluate import INSTANCE_LOSS, VALIDATION_LOSS, parse_measure, steps_between, weighted_sum
from dreambooth.config.recipe import Recipe
from dreambooth.config.schema import StopWhen
from dreambooth.errors import UserError
from dreambooth.runs import pruning
from dreambooth.runtime.engine import Engine
from dreambooth.training.evaluation_hook import EvaluationHook
from dreambooth.training.hooks import CheckpointHook, SampleHook
from dreambooth.training.setup import Setup
from dreambooth.training.step import StepInfo
from dreambooth.utils import atomic_files
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


class _AfterMeasurements:
    """Base class of a hook that is called after the hooks that measure, and once before the first step."""

    setup: Setup

    def due(self, step: int) -> bool:
        return False  # the hooks that measure are due

    def __call__(self, info: StepInfo) -> None:
        self.check(info.step)

    def before_training(self) -> None:
        """Check the step from which the run resumes, too: the process may have been killed before it did."""
        self.check(self.setup.state.step)

    def check(self, step: int) -> None:
        raise NotImplementedError


@dataclass
class EarlyStopping(_AfterMeasurements):
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
        if self.saving.takes_part:
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


@dataclass
class PruningHook(_AfterMeasurements):
    """Hook that reports each measurement to the search that has started the run, and ends the run on its request.

    Without a search, the hook does nothing. It is called after the hooks that measure and after EarlyStopping.

    Raises:
        UserError: the measure does not exist, or the run does not measure it before its last step.
    """

    setup: Setup
    recipe: Recipe
    saving: CheckpointHook
    evaluation: EvaluationHook
    stopping: EarlyStopping

    def __post_init__(self) -> None:
        self._reporter = pruning.get_reporter()
        if self._reporter is None:
            return
        objective = self.recipe.evaluate.objective
        name = self._reporter.measure or (VALIDATION_LOSS if objective == INSTANCE_LOSS else objective)
        try:
            self._weights, mode = parse_measure(name, self.recipe.measure_roles)
        except ValueError as error:
            raise UserError(f"hydra.sweeper.prune_measure {error}") from error
        self._sign = -1 if mode is Direction.max else 1
        if steps_between(self._weights, self.recipe.evaluate.every, self.recipe.train.validate_every) is None:
            raise UserError(f"hydra/sweeper/pruner compares {name} from time to time: type evaluate.every=50, steps "
                            "between evaluations")

    def before_training(self) -> None:
        super().before_training()
        (self.recipe.run_dir / pruning.PRUNED_FILE).unlink(missing_ok=True)  # a pruned run that goes on

    def check(self, step: int) -> None:
        """Report the value after `step`. If the run has to end, save it.

        Raises:
            Pruned: the run has to end.
        """
        if self._reporter is None or not 0 < step < self.recipe.train.max_train_steps or self.stopping.reached():
            return
        scores = self.evaluation.scores(step)
        if not self._weights.keys() <= scores.keys():
            return
        value = self._sign * weighted_sum(self._weights, scores)
        if not math.isfinite(value) or not self._reporter.report(step, value):
            return
        self.saving.save()
        reason = f"pruned after step {step}: other trials were better at this step; the run is saved"
        atomic_files.write_json(self.recipe.run_dir / pruning.PRUNED_FILE, {"step": step, "reason": reason})
        raise pruning.Pruned(reason)
