"""Evaluates the base model and the trained model during a run, and selects the weights to export."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dreambooth.config import evaluate
from dreambooth.config.recipe import Recipe
from dreambooth.evaluation.evaluator import Evaluator
from dreambooth.models import loading, lora
from dreambooth.models.pipeline import build_pipeline
from dreambooth.optim.ema import swap_weights
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.training import best_weights
from dreambooth.training.hooks import is_due_or_last, result_weights, swap_in_ema
from dreambooth.training.setup import Setup
from dreambooth.training.step import StepInfo
from dreambooth.training.validation import ValidationHook

log = logging.getLogger(__name__)


@dataclass
class EvaluationHook:
    """Evaluates the model every `evaluate.every` steps and after the last step, and saves the best weights so far.

    The setting evaluate.select says which weights are the best. If it names validation_loss alone, the candidates are
    every `train.validate_every`-th step.

    The hook is called after CheckpointHook. If the process is killed during an evaluation, a checkpoint of the
    evaluated step exists, and `before_training` of the resumed run repeats the evaluation.

    The base model is evaluated too, as step 0. On a CPU, this happens just before the first evaluation of trained
    weights, with a second copy of the base model, so that the first training step does not wait for an evaluation. A
    GPU may not have enough memory for a second model and the optimizer's state. A run on a GPU therefore evaluates the
    base model before the first training step, while the trained module still has the base weights.
    """

    evaluator: Evaluator | None  # None: no evaluation
    setup: Setup
    engine: Engine
    meter: MemoryMeter
    recipe: Recipe
    validation: ValidationHook  # measures the loss on held-out photos, which may select the best weights too

    def due(self, step: int) -> bool:
        return is_due_or_last(step, self.recipe.evaluate.every, self.recipe.train.max_train_steps)

    def __call__(self, info: StepInfo) -> None:
        if self.due(info.step):
            self.evaluate(info.step)
        self._keep_best(info.step)

    def before_training(self) -> None:
        """Run the evaluation that is due before the first training step of this process, if there is one.

        A new run on a GPU evaluates the base model. A resumed run evaluates the step from which it resumes, if an
        evaluation of this step was due and is missing.
        """
        step = self.setup.state.step
        if step == 0 and self.evaluator is not None and self.engine.device.type == "cuda":
            with (self.meter.phase("evaluate"), self.setup.idle.on_device(), swap_in_ema(self.setup),
                  self._base_prompts()):
                self.evaluator.evaluate(0, self.setup.pipeline)
        elif step > 0 and self.due(step):
            self.evaluate(step)
        self._keep_best(step)

    def evaluate(self, step: int) -> None:
        """Evaluate the state after `step` completed steps.

        If the base model has not been evaluated yet, evaluate it first. If a stop is requested, store nothing.
        """
        if self.evaluator is None:
            return
        every = self.recipe.evaluate.every
        scores: dict[str, float] | None
        with self.meter.phase("evaluate"), self.setup.idle.on_device():
            if self.engine.run_on_main(self.evaluator.needs_base_model):
                with self._base_pipeline() as pipeline:
                    if self.evaluator.evaluate(0, pipeline) is None:
                        return
            with swap_in_ema(self.setup):
                scores = self.evaluator.evaluate(step, self.setup.pipeline)
        if scores is not None and every and step % every == 0 and self.recipe.train.stop_when.measure is not None:
            self.setup.state.history.record(step, scores)

    def _keep_best(self, step: int) -> None:
        """Save the weights of the state after `step` completed steps, if they are the best so far."""
        every, shared = self._select_every, self.setup.state.sharded is not None
        if not (every and step and step % every == 0 and (shared or self.engine.is_main_process)):
            return

        def is_best() -> bool:
            return step == self.best_step(step)

        if not (self.engine.run_on_main(is_best) if shared else is_best()):
            return
        with self.meter.phase("save"):
            weights = result_weights(self.setup)
            if self.engine.is_main_process:
                best_weights.save(self.best_folder, step, weights)

    @property
    def best_folder(self) -> Path:
        """The folder of the best weights so far: `best/` in the run folder."""
        return self.recipe.run_dir / "best"

    def best_step(self, last: int) -> int | None:
        """Return the best evaluated step up to step `last`, or None if the run does not select the best step."""
        if (every := self._select_every) is None:
            return None
        steps = set(self.validation.values) | set(self.evaluator.scores() if self.evaluator else ())
        scores = {step: self.scores(step) for step in steps}
        return best_weights.best_step({step: values for step, values in scores.items()
                                       if self._select_weights.keys() <= values.keys()},
                                      self._select_weights, every, last)

    @cached_property
    def _select_weights(self) -> dict[str, float]:
        """The weight of each measure in evaluate.select; {} if the run does not select the best step."""
        select = self.recipe.evaluate.select
        return {} if select is None else evaluate.parse_sum(select, self.recipe.measure_roles)

    @property
    def _select_every(self) -> int | None:
        """The number of steps between the candidates of evaluate.select; None: the run does not select the best step.
        """
        if not (weights := self._select_weights):
            return None
        return evaluate.steps_between(weights, self.recipe.evaluate.every, self.recipe.train.validate_every)

    def exported_step(self) -> int:
        """Return the step whose weights are exported.

        This is the best evaluated step if the run selects the best step and its weights are still on the disk.
        Otherwise it is the last step. The weights on the disk are read and compared with their checksums.
        """
        last = self.setup.state.step
        step = self.best_step(last) or last
        if step != last and best_weights.saved_step(self.best_folder) != step:
            log.warning("step %d is the best, but its weights are no longer in %s: step %d is exported",
                        step, self.best_folder, last)
            return last
        return step

    def exported_weights(self, step: int, exact: bool = False) -> AbstractContextManager[Any]:
        """Put the weights to export into the trained module in a `with` block.

        Args:
            step: the result of `exported_step`.
            exact: whether the weights keep their precision, so that they can be written to a file; see `swap_in_ema`.
        """
        if step == self.setup.state.step:
            return swap_in_ema(self.setup, exact)
        return best_weights.swap_into(self.best_folder, self.setup.trained, exact)

    def scores(self, step: int) -> dict[str, float]:
        """Return the scores of the state after `step` completed steps; {} if this state was not evaluated."""
        scores = self.evaluator.scores().get(step, {}) if self.evaluator else {}
        held_out = self.validation.values.get(step)
        return scores | ({} if held_out is None else {evaluate.VALIDATION_LOSS: held_out})

    @contextmanager
    def _base_pipeline(self) -> Iterator[Any]:
        """Yield a pipeline of the base model.

        If the run trains an adapter, the adapter is switched off. Otherwise a run on a CPU loads a second copy of the
        base model. A resumed run on a GPU copies the base weights into the trained module, one by one. The trained
        weights are in host memory meanwhile, so that the GPU never holds a second model.
        """
        if self.recipe.method.low_rank:
            with lora.disabled(self.setup.trained), self._base_prompts():
                yield self.setup.pipeline
            return
        if self.engine.device.type != "cuda":
            yield build_pipeline(loading.load(self.recipe, self.engine.device))
            return
        parts = loading.load(self.recipe, torch.device("cpu"))
        base = loading.trained_model(parts, self.recipe)
        with swap_weights(self.setup.trained, dict(base.named_parameters())):
            yield self.setup.pipeline

    def _base_prompts(self) -> AbstractContextManager[Any]:
        """Let the pipeline read prompts without the run's new tokens, which the base model does not have."""
        parts = self.setup.parts
        if parts.new_tokens is None:
            return nullcontext()
        return parts.new_tokens.unread(self.setup.pipeline, parts.family.tokenizers)
