"""The words around a run: the plan before it, the summary after it."""

from collections.abc import Mapping
from typing import Any

from dreambooth.config.evaluate import HIGHER_IS_BETTER
from dreambooth.config.recipe import Recipe
from dreambooth.runs.run_folder import Result


def plan(recipe: Recipe) -> dict[str, str]:
    """What is about to happen, in a few rows."""
    train, prior = recipe.train, recipe.prior
    seen = train.train_batch_size * train.gradient_accumulation_steps
    return {
        "subject": "; ".join(f"{one.instance_prompt!r}, photos in {_short(str(one.instance_dir))}"
                             for one in recipe.subjects),
        "class": f"{', '.join(repr(one.class_prompt) for one in recipe.classes)}, {prior.num_class_images} images, "
                 f"weight {prior.prior_loss_weight:g}" if recipe.with_prior else "no prior preservation",
        "base": f"{recipe.model.source}, {recipe.model.resolution} px",
        "trains": trained(recipe),
        "steps": f"{train.max_train_steps} of {seen} photo{'s' if seen > 1 else ''} a process, "
                 f"learning rate {train.learning_rate:g} {train.lr_scheduler.value}",
        "on": f"{recipe.hardware.gpu or 'CPU'}, {recipe.precision.label}, {recipe.optimizer.kind.value}, "
              f"{recipe.attention.kind.value} attention",
        "run": _short(str(recipe.run_dir)),
    }


def trained(recipe: Recipe) -> str:
    """Which weights change."""
    where = "UNet and text encoder" if recipe.train.train_text_encoder else "UNet"
    method = recipe.method
    return f"{where}, {method.kind.value} of rank {method.rank} beside them" if method.low_rank else where


def already(result: Result, recipe: Recipe) -> str:
    """Nothing to do: the same run was finished before."""
    asked = recipe.train.max_train_steps
    more = "" if result.step == asked else f" (you asked for {asked})"
    return (f"this run is finished: {result.step} steps{more}, model in {_short(result.run_dir)}/{result.model}. "
            f"More: train.max_train_steps={2 * result.step}. Anew: checkpoint.resume=never")


def summary(result: Result, recipe: Recipe, tracking: str | None) -> dict[str, str]:
    """Where the results are."""
    folder = _short(result.run_dir)
    rows = {"done": f"{result.step} steps, objective {result.objective:.4f}, {result.seconds:.0f} s of training"}
    if result.exported_step not in (None, result.step):
        rows["exported"] = f"step {result.exported_step}, the best by {recipe.evaluate.select}"
    rows |= measures(result.scores, result.base_scores, recipe)
    if (recipe.run_dir / "contact_sheet.png").is_file():
        rows["look at"] = f"{folder}/contact_sheet.png"
    rows["model"] = f"{folder}/{result.model}"
    rows["metrics"] = f"{folder}/metrics.jsonl" + (f", MLflow at {tracking}" if tracking else "")
    rows["use it"] = f'python -m dreambooth.generate run={folder} prompt="{recipe.instance_prompt}"'
    return rows


def measures(scores: Mapping[str, float], base: Mapping[str, float], recipe: Recipe) -> dict[str, str]:
    """Each measure with the base's value and which way is better."""
    better = {name: "higher" if HIGHER_IS_BETTER[role] else "lower" for name, role in recipe.measured.items()}
    return {name: f"{value:z.3f}  base {base[name]:z.3f}, {better[name]} is better" if name in base else f"{value:z.3f}"
            for name, value in scores.items() if name in better}


def promoted(told: Mapping[str, Any]) -> str:
    """What a promotion did, in a sentence."""
    measure = told["class_similarity"]
    seen = f", {measure['name']} {measure['value']:.3f}" if measure else ", class_similarity not measured"
    instead = f" instead of version {told['replaced']}" if told["replaced"] else ""
    return (f"{told['name']} version {told['version']} is {told['alias']}{instead}: {told['run']}, "
            f"{told['objective_name']} {told['objective']:.4f}{seen}. Load it as {told['model_uri']} "
            f"from MLflow at {told['server']}")


def _short(path: str) -> str:
    """Relative to where the user is, if it lies below."""
    from pathlib import Path

    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
