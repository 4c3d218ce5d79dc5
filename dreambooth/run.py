"""The composition root: Recipe in, Result out. The only file that knows everyone; it decides nothing itself."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from math import nan

from dreambooth.config.evaluate import INSTANCE_LOSS
from dreambooth.config.recipe import Recipe
from dreambooth.data.prefetch import Ahead
from dreambooth.evaluation.evaluator import Evaluation
from dreambooth.models import loading
from dreambooth.planner import auto_memory
from dreambooth.runs import report
from dreambooth.runs.run_folder import Result, check_disk, finished, judged, locked, resume_point
from dreambooth.runtime import oom_advice
from dreambooth.runtime.engine import Engine, accelerated
from dreambooth.runtime.memory_meter import Meter
from dreambooth.serialization import export
from dreambooth.tracking.run_tracker import tracked
from dreambooth.tracking.tracker import Tracker
from dreambooth.training import best_weights, checkpoint
from dreambooth.training.hooks import All, Log, Measure, Samples, Save
from dreambooth.training.instance_loss import instance_loss
from dreambooth.training.loop import fit
from dreambooth.training.sample_images import SampleBook
from dreambooth.training.setup import Setup, assemble
from dreambooth.training.step import train_step
from dreambooth.training.stop_hook import Halt
from dreambooth.utils import atomic_files, provenance
from dreambooth.utils.console import Console
from dreambooth.utils.signals import Stop


def execute(recipe: Recipe, stop: Stop, predicted: Mapping[str, float] | None = None) -> Result:
    """Train, go on training or, if there is nothing left to do, report the run that `recipe` describes.

    Args:
        predicted: peaks by phase in GiB, told beside the seen ones if memory runs out.

    Raises:
        DreamBoothError: see errors.py. Whatever was saved before stays.
    """
    loading.import_libraries()
    engine, accelerator = accelerated(recipe.device, recipe.precision.dtype, recipe.precision.tf32)
    console = Console(quiet=not engine.main)
    with locked(recipe.run_dir) if engine.main else nullcontext():
        done: Result | None = engine.share(finished(recipe) if engine.main else None)
        if done:
            with tracked(recipe, engine.main, trains=False):  # sends what a server missed
                console.say(report.already(done, recipe))
                return done
        recipe, expected, chosen = engine.share(auto_memory.settled(recipe, engine.world) if engine.main else None)
        console.table(report.plan(recipe) | ({"memory": chosen} if chosen else {}))
        start = engine.share(resume_point(recipe.run_dir, recipe.checkpoint.resume) if engine.main else None)
        advice = partial(oom_advice.advice, recipe=recipe.among(engine.world))
        meter = Meter(engine.device, advice, predicted or expected)
        setup = assemble(recipe, engine, accelerator, console, meter, stop)
        if start:
            with meter.phase("resume"):
                checkpoint.restore(start, setup.state, setup.trained, engine.scaler)
            console.say(f"going on after step {setup.state.step} from {start.name}")
        if engine.main:
            check_disk(recipe.run_dir, _needed_bytes(recipe, setup))
        with tracked(recipe, engine.main) as tracker:  # from here on it is a run; before, only input was wrong
            result = _train(recipe, engine, setup, console, meter, tracker, stop)
        console.table(report.summary(result, recipe, tracker.url()))
        return result


def _train(recipe: Recipe, engine: Engine, setup: Setup, console: Console, meter: Meter, tracker: Tracker,
           stop: Stop) -> Result:
    state, last = setup.state, recipe.train.max_train_steps
    if engine.main:
        origin = provenance.origin()
        atomic_files.write_json(recipe.run_dir / "run.json", origin | {"settings": recipe.settings()})
        tracker.artifact(recipe.run_dir / "run.json")
        tracker.params(recipe.headline())
        tracker.tags(origin)
        tracker.metrics(state.step, meter.expected)
    book = SampleBook(recipe, setup.photos, tracker)
    samples = Samples(book, setup, engine, meter, recipe.sample.every, last)
    save = Save(setup, engine, meter, recipe)
    evaluation = Evaluation(recipe, setup.judge, tracker, engine.device) if setup.judge else None
    measure = Measure(evaluation, setup, engine, meter, recipe, stop)
    if engine.main and state.step == 0 and recipe.sample.every is not None:
        samples.now(0)
    measure.begin()
    stop.check()
    began = time.monotonic()
    step = partial(train_step, objective=setup.objective, engine=engine, max_grad_norm=recipe.train.max_grad_norm)
    with meter.phase("step"), console.bar("training", last, state.step) as bar, Ahead(setup.batches, last) as ahead:
        hooks = All([Log(tracker, bar, meter), samples, save, measure] if engine.main else [], Halt(stop, engine, save))
        for info in fit(state, ahead, step, last, hooks.due):
            hooks(info)
    return _finish(recipe, engine, setup, measure, tracker, meter, time.monotonic() - began)


def _needed_bytes(recipe: Recipe, setup: Setup) -> int:
    kept = checkpoint.needed_bytes(setup.state, setup.trained, recipe.checkpoint.keep)
    best = best_weights.needed_bytes(setup.trained) if recipe.evaluate.select else 0
    return kept + best + export.size_bytes(setup.parts, recipe)


def _finish(recipe: Recipe, engine: Engine, setup: Setup, measure: Measure, tracker: Tracker, meter: Meter,
            seconds: float) -> Result:
    """Score and export the best weights, or the last: of the EMA, if there is one."""
    step = setup.state.step
    with meter.phase("export"):
        with measure.exported() as exported, engine.autocast():
            scores = measure.scores(exported) | {INSTANCE_LOSS: instance_loss(setup)}
        result = Result(step, nan, seconds, str(recipe.run_dir), "model", exported, scores, measure.scores(0))
        if not engine.main:
            return result
        result = judged(result, recipe)
        with measure.exported(exact=True):
            folder = export.export(setup.parts, recipe, exported, recipe.run_dir / "contact_sheet.png")
    tracker.metrics(step, meter.peaks | {
        "objective": result.objective, INSTANCE_LOSS: scores[INSTANCE_LOSS], "exported_step": exported,
        "skipped_steps": setup.state.skipped})
    tracker.tags({"model": str(folder)})
    for name in ("contact_sheet.png", "model/README.md", "model/pytorch_lora_weights.safetensors"):
        if (recipe.run_dir / name).is_file():
            tracker.artifact(recipe.run_dir / name)
    result.write()
    return result
