"""A sweep as a whole: what differs between its trials, the table of how they ended, and what MLflow is told of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreambooth.cloud import sweep_results
from dreambooth.cloud.job import COMPLETED, FAILED
from dreambooth.sweeps.trials import Trial, find
from dreambooth.tracking.svg_charts import tidy

SAME = {"name", "device", "sample_prompts", "evaluate.promote"}  # settings that tell nobody what a trial is


def differing(trials: Sequence[Trial]) -> list[str]:
    """Keys of the settings that are not alike in all trials; what was typed comes first."""
    keys = dict.fromkeys(key for trial in trials for key in (*trial.params, *trial.settings))
    return [key for key in keys if key not in SAME and len({trial.settings.get(key) for trial in trials}) > 1]


def title(trial: Trial, keys: Sequence[str]) -> str:
    """A trial by what differs, or the name of its folder."""
    return " ".join(f"{key.rpartition('.')[2]}={tidy(trial.settings.get(key, '?'))}" for key in keys[:4]) \
        or trial.folder.name


def value(trial: Trial) -> float | None:
    """The objective of a finished trial, None if it has none that is a number."""
    number = (trial.result or {}).get("objective") if trial.finished else None
    return float(number) if isinstance(number, int | float) and math.isfinite(number) else None


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first, what is not finished last."""
    return sorted(trials, key=lambda trial: math.inf if (number := value(trial)) is None else number)


def keep(jobs: Sequence[tuple[Path, list[str], float | None]], sweep: str, run_root: Path, *, kind: str,
         uri: str | None, experiment: str) -> Path:
    """Write `results-SWEEP.csv`, and tell MLflow of the sweep in a run of its own.

    Args:
        jobs: folder, overrides and objective of what this process ran; None: it failed.
    """
    trials = find(run_root, sweep)
    table = _rows(trials)
    known = {trial.folder.resolve() for trial in trials}
    table += [_failed(len(table) + i, words) for i, (folder, words, number) in enumerate(
        job for job in jobs if job[2] is None and job[0].resolve() not in known)]
    path = sweep_results.write(run_root, sweep, table)
    picture = sweep_results.draw(run_root, sweep, axes(trials))
    sweep_results.track(path, sweep, table, kind, uri, experiment, run_root, picture)
    return path


def axes(trials: Sequence[Trial]) -> dict[str, list[str | float]]:
    """Parallel coordinates: what differs, then the measures, then the objective; a value a finished trial."""
    done = [trial for trial in ranked(trials) if value(trial) is not None]
    columns: dict[str, list[str | float]] = {
        key.rpartition(".")[2]: [trial.settings.get(key, "") for trial in done] for key in differing(done)}
    for role in ("subject_similarity", "class_similarity"):
        scores = [trial.score(role) for trial in done]
        if done and all(scores):
            columns[role] = [round(score[1], 5) for score in scores if score]
    return columns | {"objective": [float(value(trial) or 0.0) for trial in done]} if done else {}


def _rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    keys, rows = differing(trials), []
    for number, trial in enumerate(trials):
        told, objective = trial.result or {}, value(trial)
        rows.append({
            "number": number, "job": trial.folder.name, "status": FAILED if objective is None else COMPLETED,
            "objective": objective, "steps": told.get("step"), "seconds": told.get("seconds"), "billed_usd": None,
            "reason": "" if objective is not None else "the run said why",
            **{key: trial.settings.get(key, "") for key in keys},
            **{name: round(score, 6) for name, score in told.get("scores", {}).items()}})
    return rows


def _failed(number: int, overrides: list[str]) -> dict[str, Any]:
    return {"number": number, "job": f"#{number}", "status": FAILED, "objective": None, "steps": None, "seconds": None,
            "billed_usd": None, "reason": "the run said why",
            **dict(word.lstrip("+").partition("=")[::2] for word in overrides)}


def dumped(content: object) -> str:
    """JSON that may stand inside a script of a page."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
