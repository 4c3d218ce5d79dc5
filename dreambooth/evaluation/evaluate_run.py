"""Measures what a finished run has made, beside what its base makes of the same prompts and seeds."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.evaluation.evaluator import Evaluation, Judge
from dreambooth.models import loading, lora
from dreambooth.models.pipeline import build_pipeline
from dreambooth.runs.report import measures
from dreambooth.runs.run_folder import locked
from dreambooth.runtime.engine import accelerated
from dreambooth.serialization import lora_files
from dreambooth.tracking.run_tracker import tracked
from dreambooth.utils.console import Console


def assess(recipe: Recipe) -> dict[str, float]:
    """Draw, score, log, and show the scores; what was measured before, in the run or here, is not drawn again.

    Raises:
        UserError: the run is not finished, or nothing is to measure with.
    """
    if not recipe.evaluate.encoders:
        raise UserError("the run has evaluate.encoder=none: type encoder=efficientnet_lite0, or encoder=paper")
    step = _exported_step(recipe.run_dir)
    loading.import_libraries()
    engine, _ = accelerated(recipe.device, recipe.precision.dtype, recipe.precision.tf32)
    console, judge = Console(), Judge(recipe)
    with locked(recipe.run_dir), tracked(recipe, main=True, trains=False) as tracker:
        evaluation = Evaluation(recipe, judge, tracker, engine.device)
        missing = [number for number in (0, step) if number not in evaluation.scores()]
        with console.bar("pictures", evaluation.count * len(missing)) as bar:
            for number, parts_of in ((0, _base), (step, _own)):
                pipeline = build_pipeline(parts_of(recipe, engine.device)) if number in missing else None
                evaluation.measure(number, pipeline, engine.autocast, tick=bar.tick)
        scores = evaluation.scores()
    console.table(measures(scores[step], scores[0], recipe))
    console.say(f"pictures and scores in {evaluation.folder}")
    return scores[step]


def _base(recipe: Recipe, device: torch.device) -> loading.Components:
    return loading.load(recipe, device)


def _own(recipe: Recipe, device: torch.device) -> loading.Components:
    """The run's model in place of the base, or its adapter beside it as it was in training."""
    folder = recipe.run_dir / "model"
    if (folder / "model_index.json").is_file():
        return loading.load(replace(
            recipe, source=str(folder), vae_source=None,
            model=replace(recipe.model, revision=None, variant=None, zero_terminal_snr=False)), device)
    parts = loading.load(recipe, device)
    lora.teach(loading.prepare(parts, recipe), lora_files.read(folder / lora_files.DIFFUSERS))
    return parts


def _exported_step(run_dir: Path) -> int:
    try:
        result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
        return int(result.get("exported_step") or result["step"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the run in {run_dir} is not finished: repeat its command first, "
                        "python -m dreambooth.train ...") from error
