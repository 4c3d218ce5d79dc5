"""Evaluates a finished run and its base model with the same prompts and seeds, for `dreambooth.evaluate`."""

from dataclasses import replace
from pathlib import Path

import torch

from dreambooth.config.enums import MethodKind
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.evaluation.evaluator import Evaluator, Scorer
from dreambooth.models import loading, lora
from dreambooth.models.new_tokens.attach import attach as attach_new_tokens
from dreambooth.models.pipeline import build_pipeline
from dreambooth.runs.report import score_table
from dreambooth.runs.run_folder import locked, read_result
from dreambooth.runtime.engine import create_engine
from dreambooth.serialization import embedding_files, lora_files
from dreambooth.serialization.export_layout import ADAPTER, check_intact, find_adapter
from dreambooth.tracking.run_tracker import track_run
from dreambooth.utils.console import Console
from dreambooth.utils.signals import StopRequest


def evaluate_run(recipe: Recipe) -> dict[str, float]:
    """Generate and score images of the base model and of the exported model. Return the scores of the exported model.

    The scores are also tracked and printed. The scores of the base model belong to step 0. The scores of the exported
    model belong to the step whose weights were exported. A step that was evaluated before with the same settings, by
    the run or by this command, is not evaluated again.

    Raises:
        UserError: the run is not finished, or the recipe names no encoder.
    """
    if not recipe.evaluate.encoders:
        raise UserError("the run has evaluate.encoder=none: type encoder=efficientnet_lite0, or encoder=paper")
    step = _exported_step(recipe.run_dir)
    loading.import_libraries()
    engine, _ = create_engine(recipe.device, recipe.precision.dtype, recipe.precision.tf32)
    console, scorer = Console(), Scorer(recipe)
    with locked(recipe.run_dir), track_run(recipe, main=True, update_status=False) as tracker:
        evaluator = Evaluator(recipe, scorer, tracker, engine, StopRequest())  # signals end this command at once
        images = {number: evaluator.num_images(number) for number in (0, step)}
        with console.bar("images", sum(images.values())) as bar:
            for number, load_parts in ((0, _load_base), (step, _load_trained)):
                pipeline = build_pipeline(load_parts(recipe, engine.device)) if images[number] else None
                evaluator.evaluate(number, pipeline, tick=bar.tick)
        scores = evaluator.scores()
    console.table(score_table(scores[step], scores[0], recipe))
    console.say(f"images and scores in {evaluator.folder}")
    return scores[step]


def _load_base(recipe: Recipe, device: torch.device) -> loading.Components:
    loading.encode_prompts(recipe, device, lambda: recipe.evaluated_prompts)
    return loading.load(recipe, device)


def _load_trained(recipe: Recipe, device: torch.device) -> loading.Components:
    """Load the exported model of the run.

    The exported model is either a whole model, or an adapter. An adapter is attached to the base model as in training.
    """
    folder = recipe.run_dir / "model"
    check_intact(folder)
    if (folder / "model_index.json").is_file():
        return _load_base(replace(
            recipe, source=str(folder), vae_source=None,
            model=replace(recipe.model, revision=None, variant=None, zero_terminal_snr=False)), device)
    parts = _load_base(recipe, device)
    file = find_adapter(folder) or folder / ADAPTER
    adapter = lora_files.read(file)
    if recipe.method.kind is MethodKind.loha:  # the file contains the LoRA that it equals
        recipe = replace(recipe, method=lora.lora_like(
            adapter, recipe.method, loading.trained_model(parts, recipe), parts.family.published_name))
    attach_new_tokens(parts, recipe)
    model = loading.prepare(parts, recipe)
    lora.load_adapter_weights(model, adapter, parts.family.published_name)
    embedding_files.load_into(parts, file)
    return parts


def _exported_step(run_dir: Path) -> int:
    if (result := read_result(run_dir)) is None:
        raise UserError(f"the run in {run_dir} is not finished: repeat its command first, "
                        "python -m dreambooth.train ...")
    return result.exported_step or result.step
