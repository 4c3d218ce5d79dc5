"""Renders a sweep as one HTML file with embedded images and charts. The file can be opened offline."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.config.evaluate import HIGHER_IS_BETTER
from dreambooth.sweeps.summary import (
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
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.image_grid import data_url
from dreambooth.utils.plurals import counted

MAX_STEPS = 16  # greatest number of steps on the slider
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
    parts = {
        "TITLE": escape(f"Sweep {sweep}"), "ABOUT": _about(trials, keys), "TABLE": _table(trials, names),
        "GRID": _image_grid(names, prompts, images, steps), "STEPS": to_script_json(steps),
        "PICTURES": to_script_json(images), "LAST": str(max(0, len(steps) - 1)), "HIDDEN": "" if steps else "hidden",
        "CHARTS": _charts(trials, names), "PARALLEL": svg_charts.parallel_coordinates(parallel_axes(trials)),
        "PHOTOS": _photos(trials), "SETTINGS": _settings(trials, names, keys)}
    text = (Path(__file__).parents[1] / "assets" / "compare.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def _unique_names(trials: Sequence[Trial], keys: Sequence[str]) -> list[str]:
    """Return one unique name per trial: its title.

    If several trials have the same title, each of their names ends with the hash in the name of the trial's run folder.
    """
    names = [trial_title(trial, keys) for trial in trials]
    return [name if names.count(name) == 1 else f"{name} {trial.folder.name.rpartition('-')[2]}"
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


def _about(trials: Sequence[Trial], keys: Sequence[str]) -> str:
    """Return the line below the page title: prompt, model, number of trials, and `keys`.

    Args:
        keys: the keys of the settings that differ between trials.
    """
    settings = trials[0].settings
    done = sum(finished_objective(trial) is not None for trial in trials)
    parts = [f"<b>{escape(settings.get('dataset.instance_prompt', '?'))}</b>, "
             f"{escape(settings.get('model.name', '?'))} at {escape(settings.get('model.resolution', '?'))} px, "
             f"method {escape(settings.get('method.name', '?'))}",
             counted(len(trials), 'trial') + (f", {len(trials) - done} not finished" if done < len(trials) else ""),
             "they differ in " + ", ".join(f"<code>{escape(key)}</code>" for key in keys[:6]) if keys else ""]
    return " · ".join(part for part in parts if part)


def _table(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """Return the HTML table with the results of each trial: objective and measures (metrics of image quality)."""
    roles: dict[str, str] = {}
    for trial in trials:
        roles |= trial.measure_roles if trial.settings and trial.finished else {}
    roles = {name: role for name, role in roles.items() if any(name in trial.scores for trial in trials)}
    best_scores = {name: (max if HIGHER_IS_BETTER[role] else min)(
        (trial.scores[name] for trial in trials if name in trial.scores), default=0.0)
        for name, role in roles.items()}
    heads = "".join(f'<th class="n" title="{escape(name)}">{escape(role.replace("_", " "))} '
                    f'{"↑" if HIGHER_IS_BETTER[role] else "↓"}</th>' for name, role in roles.items())
    best = next((i for i, trial in enumerate(trials)
                 if finished_objective(trial) is not None and not reason_out_of_bounds(trial, Bounds())), -1)
    rows = []
    for i, (trial, name) in enumerate(zip(trials, names, strict=True)):
        objective, result = finished_objective(trial), trial.result or {}
        cells = "".join(f'<td class="n{" top" if trial.scores.get(measure) == best_scores[measure] else ""}">'
                        f"{f'{trial.scores[measure]:z.3f}' if measure in trial.scores else '-'}</td>"
                        for measure in roles)
        rows.append(
            f'<tr data-row="{i}"><td><label><input type="checkbox" checked data-toggle="{i}"><i style="background:'
            f'{colour(i)}"></i>{escape(name)}</label>{_badge(trial, i == best)}</td>'
            f'<td class="n">{"not finished" if objective is None else format_number(objective)}</td>{cells}'
            f'<td class="n">{escape(str(result.get("step", "-")))}</td><td class="n">{_format_seconds(result)}</td>'
            "</tr>")
    return (f'<table><thead><tr><th>trial</th><th class="n">objective ↓</th>{heads}<th class="n">steps</th>'
            f'<th class="n">time</th></tr></thead><tbody>{"".join(rows)}</tbody></table>')


def _format_seconds(result: Mapping[str, Any]) -> str:
    """Return the training time of a run as text, or "-" if the run's result.json has no valid time.

    Args:
        result: the content of result.json.
    """
    seconds = result.get("seconds", 0)
    return f"{seconds:.0f} s" if isinstance(seconds, int | float) else "-"


def _badge(trial: Trial, best: bool) -> str:
    """Return the label of a trial as HTML: "best", "out of bounds", or an empty string.

    "out of bounds" means that the trial must not be promoted because of its class_similarity or prompt_fidelity
    (`reason_out_of_bounds`).

    Args:
        best: whether the trial is the best of the sweep.
    """
    if best:
        return "<em>best</em>"
    reason = reason_out_of_bounds(trial, Bounds()) if finished_objective(trial) is not None else None
    return f'<em class=warn title="{escape(reason)}">out of bounds</em>' if reason else ""


def _image_grid(names: Sequence[str], prompts: Sequence[str], images: Sequence[Mapping[int, Sequence[str]]],
                steps: Sequence[int]) -> str:
    """Return the HTML table of sample images, with one row per prompt and one column per trial."""
    if not steps:
        return "<p>These trials generated no samples (sample.every=null).</p>"
    heads = "".join(f'<th data-col="{i}"><i style="background:{colour(i)}"></i>{escape(name)}<small data-at="{i}">'
                    "</small></th>" for i, name in enumerate(names))
    style = f'style="min-width:{118 + 132 * len(names)}px"'
    count = max(len(row) for by_step in images for row in by_step.values())
    rows = []
    for number in range(count):
        prompt = prompts[number] if number < len(prompts) else f"prompt {number}"
        cells = "".join(f'<td data-col="{i}"><img alt="{escape(prompt)}, {escape(name)}" data-trial="{i}" '
                        f'data-prompt="{number}"></td>' for i, name in enumerate(names))
        rows.append(f"<tr><th scope=row>{escape(prompt)}</th>{cells}</tr>")
    return (f"<table class=pictures {style}><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
            "</table>")


def _charts(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """Return one line chart per loss as HTML.

    If no trial uses prior preservation, the metric `loss` equals the instance loss, and the chart of `loss` is left
    out.
    """
    histories = [svg_charts.read_history(trial.folder / "metrics.jsonl", *CHARTS) for trial in trials]
    with_prior = any("loss_prior" in history for history in histories)
    charts = []
    for metric, title in CHARTS.items():
        lines = {name: history.get(metric, []) for name, history in zip(names, histories, strict=True)}
        if any(lines.values()) and (metric != "loss" or with_prior):
            charts.append(svg_charts.line_chart(title, lines, 366))
    return "".join(f"<figure>{svg}</figure>" for svg in charts)


def _photos(trials: Sequence[Trial]) -> str:
    """Return HTML with the training photos of the first trial, at most eight."""
    folder = Path(resolve_asset(trials[0].settings.get("dataset.instance_dir", "")))
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    images = [f'<img alt="photo {i + 1}" src="{_embed_image(path, 160)}">' for i, path in enumerate(paths[:8])]
    return f"<div class=photos>{''.join(images)}</div>" if images else "<p>The photos are not on this machine.</p>"


def _settings(trials: Sequence[Trial], names: Sequence[str], keys: Sequence[str]) -> str:
    """Return the HTML table of the settings that differ between trials. Its last row contains the run folders."""
    heads = "".join(f"<th><i style='background:{colour(i)}'></i>{escape(name)}</th>" for i, name in enumerate(names))
    rows = [f"<tr><th scope=row><code>{escape(key)}</code></th>" + "".join(
        f"<td>{escape(trial.settings.get(key, '-'))}</td>" for trial in trials) + "</tr>" for key in keys]
    folders = "".join(f"<td><code>{escape(trial.folder.name)}</code></td>" for trial in trials)
    return (f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}"
            f"<tr><th scope=row>run folder</th>{folders}</tr></tbody></table>")
