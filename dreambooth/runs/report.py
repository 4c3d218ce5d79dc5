"""Tables and messages that a run prints: the plan before training, and the summary at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.config.evaluate import HIGHER_IS_BETTER
from dreambooth.config.recipe import Recipe
from dreambooth.runs.run_folder import Result
from dreambooth.utils import quoting
from dreambooth.utils.plurals import counted


def plan_table(recipe: Recipe) -> dict[str, str]:
    """Return the plan of a run as a table: a dictionary with one item (label, content) per row."""
    train, prior = recipe.train, recipe.prior
    share = "" if train.global_batch_size else " and process"
    photos = train.global_batch_size or train.train_batch_size * train.gradient_accumulation_steps
    subjects = "; ".join(f"{subject.instance_prompt!r}, photos in {_short_path(str(subject.instance_dir))}"
                         for subject in recipe.subject_recipes)
    class_prompts = ", ".join(repr(class_recipe.class_prompt) for class_recipe in recipe.class_recipes)
    preserved = "output of the base" if recipe.preserves_output else counted(prior.num_class_images, "image")
    return {
        "subject": subjects,
        "class": f"{class_prompts}, {preserved}, weight {prior.prior_loss_weight:g}"
                 if recipe.with_prior else "no prior preservation",
        "base": f"{recipe.model.source}, {recipe.model.resolution} px",
        "trains": describe_trained_weights(recipe),
        "steps": f"{train.max_train_steps}, {counted(photos, 'photo')} per step{share}, "
                 f"learning rate {train.learning_rate:g} {train.lr_scheduler.value}",
        "on": f"{recipe.hardware.gpu or 'CPU'}, {recipe.precision.label}, {recipe.optimizer.kind.value}, "
              f"{recipe.attention.kind.value} attention",
        "run": _short_path(str(recipe.run_dir)),
    }


def describe_trained_weights(recipe: Recipe) -> str:
    """Return a phrase that names the weights a run trains, such as "denoiser, lora of rank 4"."""
    parts = "denoiser and text encoder" if recipe.train.train_text_encoder else "denoiser"
    method = recipe.method
    tokens = "".join(f", {counted(method.new_tokens, 'new token')} for {word}" for word in recipe.trigger_words)
    return f"{parts}, {method.kind.value} of rank {method.rank}{tokens}" if method.low_rank else parts


def already_finished(result: Result, recipe: Recipe) -> str:
    """Return the message that the run is finished, with the overrides to type for more training or a new start."""
    requested, more = recipe.train.max_train_steps, f"train.max_train_steps={2 * result.step}"
    note = "" if result.step == requested else f" (you asked for {requested})"
    if result.stopped:
        return (f"this run is finished: it was stopped after {counted(result.step, 'step')} of {requested}, because "
                f"{result.stopped}; model in {_short_path(result.run_dir)}/{result.model}. Another rule of "
                "train.stop_when is another run, which begins at step 0. To start this one over, type "
                "checkpoint.resume=never")
    schedule, counted_by = recipe.train.lr_scheduler, None  # what makes the number of steps a part of the run's name
    if schedule.depends_on_length:
        counted_by = f"train.lr_scheduler={schedule.value}"
    elif recipe.method.token_train_share != 1:
        counted_by = f"method.token_train_share={recipe.method.token_train_share:g}"
    elif recipe.fixed_length:
        counted_by = "a sweep over train.max_train_steps"
    advice = (f"With {counted_by}, {more} is another run, which begins at step 0. To start this one over, type "
              if counted_by else f"To train more, type {more}; to start over, ")
    return (f"this run is finished: {counted(result.step, 'step')}{note}, model in "
            f"{_short_path(result.run_dir)}/{result.model}. {advice}checkpoint.resume=never")


def summary_table(result: Result, recipe: Recipe, tracking: str | None) -> dict[str, str]:
    """Return the result of a run and the paths of its files as a table: one item (label, content) per row.

    Args:
        tracking: address of the MLflow server or database; None if the run was not tracked.
    """
    folder = _short_path(result.run_dir)
    steps = counted(result.step, "step")
    rows = {"done": f"{steps}, objective {result.objective:.4f}, {result.seconds:.0f} s of training"}
    if result.objectives:
        rows["done"] = f"{steps}, {result.seconds:.0f} s of training"
        rows["objectives"] = ", ".join(f"{name} {value:.4f}" for name, value in result.objectives.items())
    if result.stopped:
        rows["stopped"] = result.stopped
    if result.exported_step not in (None, result.step):
        rows["exported"] = f"step {result.exported_step}, the best by {recipe.evaluate.select}"
    rows |= score_table(result.scores, result.base_scores, recipe)
    if (recipe.run_dir / "contact_sheet.png").is_file():
        rows["images"] = f"{folder}/contact_sheet.png"
    rows["model"] = f"{folder}/{result.model}"
    rows["metrics"] = f"{folder}/metrics.jsonl" + (f", MLflow at {tracking}" if tracking else "")
    rows["use it"] = quoting.command("generate", {"run": folder, "prompt": recipe.instance_prompt})
    return rows


def score_table(scores: Mapping[str, float], base: Mapping[str, float], recipe: Recipe) -> dict[str, str]:
    """Return a table with one item (name, content) per measure of image quality.

    The content states the score in `scores`. If `base` has the measure, the content also states the score of the base
    model, and whether a higher or a lower score is better.

    Args:
        scores: the scores of the exported weights, by measure.
        base: the scores of the base model before training, by measure.
    """
    better = {name: "higher" if HIGHER_IS_BETTER[role] else "lower" for name, role in recipe.measure_roles.items()}
    return {name: f"{value:z.3f}  base {base[name]:z.3f}, {better[name]} is better" if name in base else f"{value:z.3f}"
            for name, value in scores.items() if name in better}


def promotion_message(promotion: Mapping[str, Any]) -> str:
    """Return a message about a promotion: the model version and its alias in MLflow, its scores, and how to load it.

    Args:
        promotion: the return value of `promote` or `register_run` in sweeps/promotion.py.
    """
    scores = "".join(
        f", {measure['name']} {measure['value']:.3f}" if (measure := promotion[role]) else f", {role} not measured"
        for role in ("class_similarity", "prompt_fidelity"))
    replaced = f" instead of version {promotion['replaced']}" if promotion["replaced"] else ""
    rule = f" by the rule {promotion['rule']}" if promotion.get("rule") else ""
    base = promotion.get("referenced_base")
    reference = (f". Its base model {base} is not registered with it: on another machine, set DREAMBOOTH_BASE to its "
                 "folder there, or promote with include_base=true") if base else ""
    return (f"{promotion['name']} version {promotion['version']} is {promotion['alias']}{replaced}: "
            f"{promotion['run']}, {promotion['objective_name']} {promotion['objective']:.4f}{rule}{scores}. "
            f"Load it as {promotion['model_uri']} from MLflow at {promotion['server']}{reference}")


def _short_path(path: str) -> str:
    """Return the path relative to the working directory, or unchanged if it is outside the working directory."""
    working_dir = Path.cwd()
    return str(Path(path).relative_to(working_dir)) if Path(path).is_relative_to(working_dir) else path
