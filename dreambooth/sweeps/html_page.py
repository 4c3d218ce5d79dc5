"""Renders a sweep as one HTML file with embedded images and charts. The file can be opened offline."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from dreambooth.config.enums import Direction
from dreambooth.config.evaluate import HIGHER_IS_BETTER, better_direction
from dreambooth.sweeps.summary import (
    common_objectives,
    find_front,
    finished_objective,
    parallel_axes,
    rank_trials,
    to_script_json,
    trial_title,
    varied_settings,
)
from dreambooth.sweeps.trials import Bounds, Trial, reason_out_of_bounds
from dreambooth.tracking import svg_charts
from dreambooth.tracking.svg_charts import colour, format_number
from dreambooth.utils import assets, atomic_files
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.image_grid import data_url
from dreambooth.utils.plurals import counted

MAX_STEPS = 16  # greatest number of steps on the slider
MAX_SCATTERS = 3  # greatest number of charts of two objectives each
CHARTS = {"loss_instance": "instance loss", "loss_prior": "prior loss", "loss": "loss"}  # metric -> title


def render_page(sweep: str, trials: Sequence[Trial], pixels: int) -> str:
    """Return the HTML page that compares the trials of a sweep.

    Args:
        sweep: the sweep's ID, shown in the title.
        pixels: greatest width and height of an embedded image.
    """
    trials = rank_trials(trials)
    keys = varied_settings(trials)
    names = _unique_names(trials, keys)
    grids = [_find_sample_grids(trial.folder) for trial in trials]
    steps = _choose_steps(sorted({step for trial_grids in grids for step in trial_grids}))
    images = [{step: [_embed_image(path, pixels) for path in trial_grids[step]]
               for step in steps if step in trial_grids} for trial_grids in grids]
    prompts: list[str] = next(
        (json.loads(text) for trial in trials if (text := trial.settings.get("sample_prompts"))), [])
    return assets.render_page(
        "compare.html", sweep=sweep, about=_about(trials, keys), table=_table(trials, names), names=names,
        front=_front(trials, names), colours=[colour(number) for number in range(len(trials))], photos=_photos(trials),
        rows=_prompts_of_rows(prompts, images), steps=steps, script_steps=Markup(to_script_json(steps)),
        script_images=Markup(to_script_json(images)), charts=_charts(trials, names),
        parallel=Markup(svg_charts.parallel_coordinates(parallel_axes(trials))),
        settings={key: [trial.settings.get(key, "-") for trial in trials] for key in keys},
        folders=[trial.folder.name for trial in trials])


def _unique_names(trials: Sequence[Trial], keys: Sequence[str]) -> list[str]:
    """Return one unique name per trial: its title.

    If several trials have the same title, each of their names ends with the hash in the name of the trial's run folder.
    """
    names = [trial_title(trial, keys) for trial in trials]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} {trial.folder.name.rpartition('-')[2]}"
            for name, trial in zip(names, trials, strict=True)]


def _find_sample_grids(folder: Path) -> dict[int, list[Path]]:
    """Return the image files of a run's sample grids: for each training step, one file per prompt.

    Steps without image files are left out.
    """
    grids = {atomic_files.trailing_number(step_folder): sorted(
        step_folder.glob("grid-*.png"), key=lambda path: atomic_files.trailing_number(path.with_suffix("")))
        for step_folder in (folder / "samples").glob("step-*")}
    return {step: paths for step, paths in grids.items() if paths}


def _choose_steps(steps: Sequence[int]) -> list[int]:
    """Return at most MAX_STEPS of the given steps, evenly spaced, among them the first and the last given step."""
    if len(steps) <= MAX_STEPS:
        return list(steps)
    indices = {round(i * (len(steps) - 1) / (MAX_STEPS - 1)) for i in range(MAX_STEPS)}
    return [steps[i] for i in sorted(indices)]


def _embed_image(path: Path, pixels: int) -> str:
    """Return an image file as a data URL. The image is reduced to a width and height of at most `pixels`."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((pixels, pixels))
    return data_url(image)


def _about(trials: Sequence[Trial], keys: Sequence[str]) -> dict[str, Any]:
    """Return the values of the line below the page title: prompt, model, number of trials, and `keys`.

    Args:
        keys: the keys of the settings that differ between trials.
    """
    settings = trials[0].settings
    return {"prompt": settings.get("dataset.instance_prompt", "?"), "model": settings.get("model.name", "?"),
            "resolution": settings.get("model.resolution", "?"), "method": settings.get("method.name", "?"),
            "trials": counted(len(trials), "trial"), "keys": keys[:6],
            "unfinished": sum(finished_objective(trial) is None for trial in trials)}


def _table(trials: Sequence[Trial], names: Sequence[str]) -> dict[str, Any]:
    """Return the values of the table with the results of each trial: objective and measures of image quality."""
    roles: dict[str, str] = {}
    for trial in trials:
        roles |= trial.measure_roles if trial.settings and trial.finished else {}
    roles = {name: role for name, role in roles.items() if any(name in trial.scores for trial in trials)}
    best_scores = {name: (max if HIGHER_IS_BETTER[role] else min)(
        (trial.scores[name] for trial in trials if name in trial.scores), default=0.0)
        for name, role in roles.items()}
    front = find_front(trials)
    best = -1 if front else next((i for i, trial in enumerate(trials)
                 if finished_objective(trial) is not None and not reason_out_of_bounds(trial, Bounds())), -1)
    rows, objectives = [], common_objectives(trials)
    for i, (trial, name) in enumerate(zip(trials, names, strict=True)):
        objective, result = finished_objective(trial), trial.result or {}
        rows.append({
            "name": name, "best": i == best, "front": trial.folder in front,
            "out_of_bounds": reason_out_of_bounds(trial, Bounds()) if objective is not None else None,
            "objectives": [format_number(trial.objectives.get(name, math.nan)) for name in objectives] or [
                format_number(objective)] if objective is not None else ["not finished"] + [""] * (len(objectives) - 1),
            "scores": [{"text": f"{trial.scores[measure]:z.3f}" if measure in trial.scores else "-",
                        "top": trial.scores.get(measure) == best_scores[measure]} for measure in roles],
            "steps": result.get("step", "-"), "time": _format_seconds(result)})
    heads = [{"measure": name, "title": role.replace("_", " "), "arrow": "↑" if HIGHER_IS_BETTER[role] else "↓"}
             for name, role in roles.items()]
    return {"heads": heads, "rows": rows, "objectives": [_axis_title(name) for name in objectives] or ["objective ↓"]}


def _front(trials: Sequence[Trial], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the values of the section about the Pareto front; None if the trials have one objective."""
    objectives = common_objectives(trials)
    on_front = find_front(trials)
    if not objectives:
        return None
    measured = [(i, trial) for i, trial in enumerate(trials)
                if trial.objectives and finished_objective(trial) is not None]
    charts = [Markup(svg_charts.scatter(
        {i: (trial.objectives[x], trial.objectives[y]) for i, trial in measured}, names,
        {i for i, trial in measured if trial.folder in on_front}, (_axis_title(x), _axis_title(y)),
        joined=len(objectives) == 2)) for x, y in itertools.combinations(objectives, 2)]
    return {"charts": charts[:MAX_SCATTERS], "count": counted(len(on_front), "trial")}


def _axis_title(objective: str) -> str:
    return f"{objective} {'↑' if better_direction(objective) is Direction.max else '↓'}"


def _format_seconds(result: Mapping[str, Any]) -> str:
    """Return the training time of a run as text, or "-" if the run's result.json has no valid time.

    Args:
        result: the content of result.json.
    """
    seconds = result.get("seconds", 0)
    return f"{seconds:.0f} s" if isinstance(seconds, int | float) else "-"


def _prompts_of_rows(prompts: Sequence[str], images: Sequence[Mapping[int, Sequence[str]]]) -> list[str]:
    """Return the prompt of each row of the table of sample images, which has one column per trial."""
    count = max((len(row) for by_step in images for row in by_step.values()), default=0)
    return [prompts[number] if number < len(prompts) else f"prompt {number}" for number in range(count)]


def _charts(trials: Sequence[Trial], names: Sequence[str]) -> list[Markup]:
    """Return one line chart per loss as SVG.

    If no trial uses prior preservation, the metric `loss` equals the instance loss, and the chart of `loss` is left
    out.
    """
    histories = [svg_charts.read_history(trial.folder / "metrics.jsonl", *CHARTS) for trial in trials]
    with_prior = any("loss_prior" in history for history in histories)
    charts = []
    for metric, title in CHARTS.items():
        lines = {name: history.get(metric, []) for name, history in zip(names, histories, strict=True)}
        if any(lines.values()) and (metric != "loss" or with_prior):
            charts.append(Markup(svg_charts.line_chart(title, lines, 366)))
    return charts


def _photos(trials: Sequence[Trial]) -> list[str]:
    """Return the training photos of the first trial as data URLs, at most eight; empty if they are not here."""
    folder = Path(resolve_asset(trials[0].settings.get("dataset.instance_dir", "")))
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    return [_embed_image(path, 160) for path in paths[:8]]
