"""Creates the hooks of a training run, and calls them in the order that resuming depends on."""

from dataclasses import dataclass

from dreambooth.config.recipe import Recipe
from dreambooth.evaluation.evaluator import Evaluator
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.tracking.tracker import Tracker
from dreambooth.training.early_stopping import EarlyStopping, PruningHook
from dreambooth.training.evaluation_hook import EvaluationHook
from dreambooth.training.hooks import CheckpointHook, Hook, HookList, LogHook, SampleHook
from dreambooth.training.sample_images import SampleRecorder
from dreambooth.training.setup import Setup
from dreambooth.training.stop_hook import StopHook
from dreambooth.training.validation import ValidationHook
from dreambooth.utils.console import Bar
from dreambooth.utils.signals import StopRequest


@dataclass
class RunHooks:
    """The hooks of a run.

    In each step, the held-out loss is measured first, so that the progress line and the checkpoint of this step contain
    it. The checkpoint follows, which never waits for pictures. Then samples and evaluation, the decisions to stop early
    and to prune, and the answer to a stop request.
    """

    sampling: SampleHook
    validation: ValidationHook
    evaluation: EvaluationHook
    saving: CheckpointHook
    stopping: EarlyStopping
    pruning: PruningHook
    answering: StopHook

    def before_training(self) -> None:
        """Do what is due before the first step of this process: at step 0, or at the step from which a run resumes."""
        self.sampling.before_training()
        self.validation.before_training()
        self.evaluation.before_training()
        self.stopping.before_training()
        self.pruning.before_training()

    def in_order(self, bar: Bar, tracker: Tracker, engine: Engine, meter: MemoryMeter) -> HookList:
        """Return all hooks, in order. Only the main process logs and writes checkpoints."""
        log = LogHook(tracker, bar, meter, lambda: self.validation.note)
        own: list[Hook] = [log] * engine.is_main_process
        own += [self.saving] * self.saving.takes_part
        return HookList([self.validation, *own], self.sampling, self.evaluation, self.stopping, self.pruning,
                        self.answering)


def create_hooks(recipe: Recipe, setup: Setup, tracker: Tracker, engine: Engine, meter: MemoryMeter,
                 stop: StopRequest) -> RunHooks:
    """Create the hooks of a run. `stop` is the object that records a request to stop (SIGTERM or Ctrl-C)."""
    sampling = SampleHook(SampleRecorder(recipe, setup.photos, tracker), setup, engine, meter, recipe, stop)
    saving = CheckpointHook(setup, engine, meter, recipe, setup.state.step or None)
    validation = ValidationHook(setup, engine, meter, recipe, tracker)
    evaluator = Evaluator(recipe, setup.scorer, tracker, engine, stop) if recipe.evaluate.encoders else None
    evaluation = EvaluationHook(evaluator, setup, engine, meter, recipe, validation)
    stopping = EarlyStopping(setup, engine, recipe, saving, sampling, evaluation)
    pruning = PruningHook(setup, recipe, saving, evaluation, stopping)
    shared = HookList([validation, sampling, evaluation])  # all processes measure and generate pictures
    answering = StopHook(stop, engine, saving, shared.due)
    return RunHooks(sampling, validation, evaluation, saving, stopping, pruning, answering)
