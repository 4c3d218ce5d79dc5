"""One HTML page of a sweep that needs nothing else: pictures and curves are inside it, it works offline and by mail."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from dreambooth.config.evaluate import HIGHER_IS_BETTER
from dreambooth.sweeps.summary import axes, differing, dumped, ranked, title, value
from dreambooth.sweeps.trials import Trial, over_bound
from dreambooth.tracking import svg_charts
from dreambooth.tracking.svg_charts import colour, short
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import asset

MAX_STEPS = 16  # on the slider
CHARTS = {"loss_instance": "instance loss", "loss_prior": "prior loss", "loss": "loss"}


def page(sweep: str, trials: Sequence[Trial], pixels: int) -> str:
    """The page.

    Args:
        pixels: greatest side of an embedded picture.
    """
    trials = ranked(trials)
    keys, pictures = differing(trials), [_samples(trial.folder) for trial in trials]
    steps = _spread(sorted({step for found in pictures for step in found}))
    prompts: list[str] = next(
        (json.loads(told) for trial in trials if (told := trial.settings.get("sample_prompts"))), [])
    names = [title(trial, keys) for trial in trials]
    names = [name if names.count(name) == 1 else f"{name} {trial.folder.name.rpartition('-')[2]}"
             for name, trial in zip(names, trials, strict=True)]
    shown = [{step: [_embedded(path, pixels) for path in found[step]] for step in steps if step in found}
             for found in pictures]
    parts = {
        "TITLE": escape(f"Sweep {sweep}"), "ABOUT": _about(trials, keys), "TABLE": _table(trials, names),
        "GRID": _grid(names, prompts, shown, steps), "STEPS": dumped(steps),
        "PICTURES": dumped(shown), "LAST": str(max(0, len(steps) - 1)), "HIDDEN": "" if steps else "hidden",
        "CHARTS": _charts(trials, names), "PARALLEL": svg_charts.parallel(axes(trials)), "PHOTOS": _photos(trials),
        "SETTINGS": _settings(trials, names, keys)}
    text = (Path(__file__).parents[1] / "assets" / "compare.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def _samples(folder: Path) -> dict[int, list[Path]]:
    """step -> a picture a prompt, those that are there."""
    found = {atomic_files.number_of(at): sorted(
        at.glob("grid-*.png"), key=lambda path: atomic_files.number_of(path.with_suffix("")))
             for at in (folder / "samples").glob("step-*")}
    return {step: paths for step, paths in found.items() if paths}


def _spread(steps: Sequence[int]) -> list[int]:
    if len(steps) <= MAX_STEPS:
        return list(steps)
    picks = {round(i * (len(steps) - 1) / (MAX_STEPS - 1)) for i in range(MAX_STEPS)}
    return [steps[i] for i in sorted(picks)]


def _embedded(path: Path, pixels: int) -> str:
    """A picture as a data address."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((pixels, pixels))
    held = io.BytesIO()
    image.save(held, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(held.getvalue()).decode()


def _about(trials: Sequence[Trial], keys: Sequence[str]) -> str:
    told = trials[0].settings
    done = sum(value(trial) is not None for trial in trials)
    rows = [f"<b>{escape(told.get('dataset.instance_prompt', '?'))}</b>, {escape(told.get('model.name', '?'))} at "
            f"{escape(told.get('model.resolution', '?'))} px, method {escape(told.get('method.name', '?'))}",
            f"{len(trials)} trials" + (f", {len(trials) - done} not finished" if done < len(trials) else ""),
            "they differ in " + ", ".join(f"<code>{escape(key)}</code>" for key in keys[:6]) if keys else ""]
    return " · ".join(row for row in rows if row)


def _table(trials: Sequence[Trial], names: Sequence[str]) -> str:
    measured: dict[str, str] = {}
    for trial in trials:
        measured |= trial.measured if trial.settings and trial.finished else {}
    measured = {name: role for name, role in measured.items() if any(name in trial.scores for trial in trials)}
    best = {name: (max if HIGHER_IS_BETTER[role] else min)(
        (trial.scores[name] for trial in trials if name in trial.scores), default=0.0)
        for name, role in measured.items()}
    heads = "".join(f'<th class="n" title="{escape(name)}">{escape(role.replace("_", " "))} '
                    f'{"↑" if HIGHER_IS_BETTER[role] else "↓"}</th>' for name, role in measured.items())
    rows = []
    first = next((i for i, trial in enumerate(trials) if value(trial) is not None and not over_bound(trial, None)), -1)
    for i, (trial, name) in enumerate(zip(trials, names, strict=True)):
        number, told = value(trial), trial.result or {}
        cells = "".join(f'<td class="n{" top" if trial.scores.get(key) == best[key] else ""}">'
                        f"{f'{trial.scores[key]:z.3f}' if key in trial.scores else '-'}</td>" for key in measured)
        rows.append(
            f'<tr data-row="{i}"><td><label><input type="checkbox" checked data-toggle="{i}"><i style="background:'
            f'{colour(i)}"></i>{escape(name)}</label>{_badge(trial, i == first)}</td>'
            f'<td class="n">{"not finished" if number is None else short(number)}</td>{cells}'
            f'<td class="n">{told.get("step", "-")}</td><td class="n">{round(told.get("seconds", 0))} s</td></tr>')
    return (f'<table><thead><tr><th>trial</th><th class="n">objective ↓</th>{heads}<th class="n">steps</th>'
            f'<th class="n">time</th></tr></thead><tbody>{"".join(rows)}</tbody></table>')


def _badge(trial: Trial, best: bool) -> str:
    """What the rule of promotion says."""
    reason = over_bound(trial, None) if value(trial) is not None else None
    return "<em>best</em>" if best else f'<em class=warn title="{escape(reason)}">over the bound</em>' if reason else ""


def _grid(names: Sequence[str], prompts: Sequence[str], shown: Sequence[Mapping[int, Sequence[str]]],
          steps: Sequence[int]) -> str:
    if not steps:
        return "<p>These trials made no samples (sample.every=null).</p>"
    heads = "".join(f'<th data-col="{i}"><i style="background:{colour(i)}"></i>{escape(name)}<small data-at="{i}">'
                    "</small></th>" for i, name in enumerate(names))
    room = f'style="min-width:{118 + 132 * len(names)}px"'
    count = max(len(row) for found in shown for row in found.values())
    rows = []
    for number in range(count):
        prompt = prompts[number] if number < len(prompts) else f"prompt {number}"
        cells = "".join(f'<td data-col="{i}"><img alt="{escape(prompt)}, {escape(name)}" data-trial="{i}" '
                        f'data-prompt="{number}"></td>' for i, name in enumerate(names))
        rows.append(f"<tr><th scope=row>{escape(prompt)}</th>{cells}</tr>")
    return (f"<table class=pictures {room}><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
            "</table>")


def _charts(trials: Sequence[Trial], names: Sequence[str]) -> str:
    found = [svg_charts.history(trial.folder / "metrics.jsonl", *CHARTS) for trial in trials]
    with_prior = any("loss_prior" in one for one in found)
    drawn = []
    for metric, words in CHARTS.items():
        lines = {name: one.get(metric, []) for name, one in zip(names, found, strict=True)}
        if any(lines.values()) and (metric != "loss" or with_prior):
            drawn.append(svg_charts.chart(words, lines, 366))
    return "".join(f"<figure>{svg}</figure>" for svg in drawn)


def _photos(trials: Sequence[Trial]) -> str:
    folder = Path(asset(trials[0].settings.get("dataset.instance_dir", "")))
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    made = [f'<img alt="photo {i + 1}" src="{_embedded(path, 160)}">' for i, path in enumerate(paths[:8])]
    return f"<div class=photos>{''.join(made)}</div>" if made else "<p>The photos are not on this machine.</p>"


def _settings(trials: Sequence[Trial], names: Sequence[str], keys: Sequence[str]) -> str:
    heads = "".join(f"<th><i style='background:{colour(i)}'></i>{escape(name)}</th>" for i, name in enumerate(names))
    rows = [f"<tr><th scope=row><code>{escape(key)}</code></th>" + "".join(
        f"<td>{escape(trial.settings.get(key, '-'))}</td>" for trial in trials) + "</tr>" for key in keys]
    folders = "".join(f"<td><code>{escape(trial.folder.name)}</code></td>" for trial in trials)
    return (f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}"
            f"<tr><th scope=row>run folder</th>{folders}</tr></tbody></table>")
