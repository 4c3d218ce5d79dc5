"""The composition root of a training run: it creates and connects the objects that turn a Recipe into a Result."""

import time
from contextlib import ExitStack
from functools import partial
from math import nan

from dreambooth.budgets import run_budget
from dreambooth.config.evaluate import INSTANCE_LOSS
from dreambooth.config.recipe import Recipe
from dreambooth.data.prefetch import Prefetcher
from dreambooth.models import loading
from dreambooth.planner import auto_memory
from dreambooth.runs import report, run_folder
from dreambooth.runs.run_folder import Result, load_finished, locked
from dreambooth.runtime import compile_cache, cpu_tuning, oom_advice
from dreambooth.runtime.engine import Engine, create_engine
from dreambooth.runtime.lost_process import reporting_lost_process
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.serialization import export, export_layout
from dreambooth.tracking.run_tracker import track_run
from dreambooth.tracking.tracker import Tracker
from dreambooth.training import checkpoint_transfer, loop
from dreambooth.training.hooks import keep_result
from dreambooth.training.instance_loss import instance_loss
from dreambooth.training.run_hooks import RunHooks, create_hooks
from dreambooth.training.setup import Setup, assemble, restore
from dreambooth.training.step import train_step
from dreambooth.utils import atomic_files, provenance
from dreambooth.utils.console import Console
from dreambooth.utils.signals import StopRequest, how_to_resume


def execute(recipe: Recipe, stop: StopRequest) -> Result:
    """Start or resume a run and return its result. If the run was already finished, print and return its stored result.

    Raises:
        DreamBoothError: the run failed or was interrupted; see errors.py. All saved files are kept.
    """
    with reporting_lost_process(recipe.checkpoint.resume), ExitStack() as stack:
        with stop.at_once():  # nothing has to be saved yet
            loading.import_libraries()
            engine, accelerator = create_engine(recipe.device, recipe.precision.dtype, recipe.precision.tf32)
            console = Console(quiet=not engine.is_main_process)
            if engine.is_main_process:
                stack.enter_context(locked(recipe.run_dir))
            done: Result | None = engine.run_on_main(partial(load_finished, recipe))
            if done:
                run_budget.count_finished(recipe)
                with track_run(recipe, engine.is_main_process, False, done.step):  # sends metrics not delivered yet
                    console.say(report.already_finished(done, recipe))
                    return done
            recipe, predicted, note = engine.run_on_main(
                partial(auto_memory.apply_auto_memory, recipe, engine.world_size))
            console.table(report.plan_table(recipe) | ({"memory": note} if note else {})
                          | compile_cache.prepare(recipe.train))
            start = checkpoint_transfer.resume_point(recipe.run_dir, recipe.checkpoint.resume, engine)
            stack.enter_context(run_budget.limit_run(recipe, stop, engine, start))
            advice = partial(oom_advice.suggest_overrides, recipe=recipe.with_processes(engine.world_size))
            meter = MemoryMeter(engine.device, advice, predicted)
            setup = assemble(recipe, engine, accelerator, console, meter)
            restore(setup, start, recipe, engine, console, meter)
            # The tracker is opened last, so that invalid input creates no MLflow run.
            tracker = stack.enter_context(track_run(recipe, engine.is_main_process, completed=setup.state.step))
        result = _train(recipe, engine, setup, console, meter, tracker, stop)
    console.table(report.summary_table(result, recipe, tracker.url()))
    return result


def _train(recipe: Recipe, engine: Engine, setup: Setup, console: Console, meter: MemoryMeter, tracker: Tracker,
           stop: StopRequest) -> Result:
    state, last = setup.state, recipe.train.max_train_steps
    if engine.is_main_process:
        origin = provenance.origin()
        atomic_files.write_json(recipe.run_dir / "run.json", origin | {"settings": recipe.settings()})
        tracker.log_artifact(recipe.run_dir / "run.json")
        tracker.log_params(recipe.tracked_settings())
        tracker.set_tags(origin)
        tracker.log_metrics(state.step, meter.predicted_metrics)
    hooks = create_hooks(recipe, setup, tracker, engine, meter, stop)
    hooks.before_training()
    stop.check()
    began = time.monotonic()
    step = partial(train_step, objective=setup.objective, engine=engine, max_grad_norm=recipe.train.max_grad_norm)
    with meter.phase("step"), console.bar("training", last, state.step) as bar, Prefetcher(setup.batches, last) as data:
        process = hooks.in_order(bar, tracker, engine, meter)
        for info in loop.fit(state, data, step, last, process.due, hooks.stopping.reached):
            process(info)
    seconds = time.monotonic() - began
    keep_result(setup)
    if not engine.is_main_process:
        return Result(state.step, nan, seconds, str(recipe.run_dir), "model", stopped=hooks.stopping.reason)
    if hooks.stopping.reason:
        console.say(f"stopped after step {state.step}: {hooks.stopping.reason}")
    resume = how_to_resume(recipe.checkpoint.resume)
    with stop.at_once(f"stopped and saved after the last step, {state.step}; {resume} to export the model"):
        return _finish(recipe, engine, setup, hooks, console, tracker, meter, seconds)


def _finish(recipe: Recipe, engine: Engine, setup: Setup, hooks: RunHooks, console: Console, tracker: Tracker,
            meter: MemoryMeter, seconds: float) -> Result:
    """Score and export the last step's weights (with evaluate.select: the best step's). With use_ema, use their EMA."""
    step, evaluation = setup.state.step, hooks.evaluation
    with meter.phase("export"):
        with evaluation.exported_weights(exported := evaluation.exported_step()), engine.autocast():
            scores = evaluation.scores(exported) | {INSTANCE_LOSS: instance_loss(setup, console)}
        result = run_folder.with_objective(Result(step, nan, seconds, str(recipe.run_dir), "model", exported, scores,
                                                  evaluation.scores(0), hooks.stopping.reason), recipe)
        cpu_tuning.release_freed_memory()  # on a CPU, that of gradients; the export reads all weights
        with evaluation.exported_weights(exported, exact=True):
            folder = export.export(setup.parts, recipe, exported, recipe.run_dir / "contact_sheet.png")
    tracker.log_metrics(step, meter.peaks | {
        "objective": result.objective, INSTANCE_LOSS: scores[INSTANCE_LOSS], "exported_step": exported,
        "skipped_steps": setup.state.skipped})
    tracker.set_tags({"model": str(folder)} | ({"stopped": hooks.stopping.reason} if hooks.stopping.reason else {}))
    for name in ("contact_sheet.png", "model/README.md", *map("model/{}".format, export_layout.ADAPTER_FILES)):
        if (recipe.run_dir / name).exists():
            tracker.log_artifact(recipe.run_dir / name)
    result.write()
    return result
