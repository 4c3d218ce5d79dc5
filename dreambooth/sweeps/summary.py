"""Summarizes a sweep: compares its trials, writes the results table, and logs the sweep to MLflow as a separate run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.cloud import sweep_results
from dreambooth.cloud.job import COMPLETED, FAILED, PRUNED
from dreambooth.runs.pruning import PRUNED_FILE
from dreambooth.sweeps.trials import Trial, find_trials, read_scores
from dreambooth.tracking.svg_charts import format_setting
from dreambooth.utils import atomic_files
from dreambooth.utils.key_names import short_names

IGNORED_SETTINGS = {"name", "device", "sample_prompts", "evaluate.promote"}  # settings that do not characterise a trial


def write_summary(jobs: Sequence[tuple[Path, list[str], float | None]], sweep: str, run_root: Path, *, kind: str,
                  uri: str | None, experiment: str, reasons: Mapping[Path, str]) -> list[str]:
    """Write `results-SWEEP.csv`, and log the sweep to MLflow as a separate run. Return the last lines of the command.

    Args:
        jobs: one tuple per run in this process: run folder, overrides, and objective (None if the run failed).
        sweep: the sweep's ID, which replaces SWEEP in the file name.
        run_root: the folder for the CSV file, which also contains the run folders.
        kind, uri, experiment: the settings of these names in the group tracking.
        reasons: why each failed run of this process failed, by run folder.
    """
    trials = find_trials(run_root, sweep)
    reasons = {folder.resolve(): reason for folder, reason in reasons.items()}
    table = _trial_rows(trials, reasons)
    known = {trial.folder.resolve() for trial in trials}
    unrecorded = [job for job in jobs if job[2] is None and job[0].resolve() not in known]
    table += [_failed_row(len(table) + i, overrides, reasons.get(folder.resolve(), sweep_results.SEE_OUTPUT))
              for i, (folder, overrides, _) in enumerate(unrecorded)]
    path = sweep_results.write_table(run_root, sweep, table)
    plot = sweep_results.write_parallel_coordinates(run_root, sweep, parallel_axes(trials))
    sweep_results.log_sweep(path, sweep, table, kind, uri, experiment, run_root, plot)
    return [*sweep_results.describe_front(table), f"sweep {sweep}: {path}",
            *sweep_results.next_commands(sweep, run_root, table)]


def varied_settings(trials: Sequence[Trial]) -> list[str]:
    """Return the keys of the settings that differ between trials. Keys that MLflow shows as params come first."""
    keys = dict.fromkeys(key for trial in trials for key in (*trial.params, *trial.settings))
    return [key for key in keys
            if key not in IGNORED_SETTINGS and len({trial.settings.get(key) for trial in trials}) > 1]


def trial_title(trial: Trial, keys: Sequence[str]) -> str:
    """Return a trial's title, such as "learning_rate=1e-4 seed=2".

    The title contains the trial's settings for the first four of `keys`. If `keys` is empty, the title is the name of
    the run folder.
    """
    return " ".join(f"{name}={format_setting(trial.settings.get(key, '?'))}"
                    for key, name in short_names(keys[:4]).items()) or trial.folder.name


def finished_objective(trial: Trial) -> float | None:
    """Return the objective of a trial; None if the trial is not finished or the objective is not a finite number."""
    value = (trial.result or {}).get("objective") if trial.finished else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def rank_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials sorted by objective, best first. Unfinished trials come last.

    With several objectives, the trials on the Pareto front come first. Among them, the first objective counts.
    """
    front = find_front(trials)
    return sorted(trials, key=lambda trial: (
        trial.folder not in front, math.inf if (value := finished_objective(trial)) is None else value))


def common_objectives(trials: Sequence[Trial]) -> list[str]:
    """Return the names of the several objectives of the finished trials; [] if there is one, or they differ.

    A trial that lacks a score has none of them, see Trial.objectives.
    """
    names = {tuple(trial.objectives) for trial in trials if finished_objective(trial) is not None} - {()}
    return list(names.pop()) if len(names) == 1 else []


def find_front(trials: Sequence[Trial]) -> set[Path]:
    """Return the folders of the trials on the Pareto front; an empty set if there are no several objectives."""
    return {trials[i].folder for i in sweep_results.find_front(
        [{} if finished_objective(trial) is None else trial.objectives for trial in trials])}


def parallel_axes(trials: Sequence[Trial]) -> dict[str, list[str | float]]:
    """Return the axes of a parallel coordinates plot, by name.

    There is one axis for each setting that differs between finished trials, and one for each objective. There are also
    axes for subject_similarity, class_similarity and prompt_fidelity, if every finished trial measured them. Each axis
    is a list with one value per finished trial, in the order of rank_trials. If no trial is finished, return an empty
    dictionary.
    """
    done = [trial for trial in rank_trials(trials) if finished_objective(trial) is not None]
    axes: dict[str, list[str | float]] = {
        name: [trial.settings.get(key, "") for trial in done]
        for key, name in short_names(varied_settings(done)).items()}
    for role in ("subject_similarity", "class_similarity", "prompt_fidelity"):
        scores = [trial.score(role) for trial in done]
        if done and all(scores):
            axes[role] = [round(score[1], 5) for score in scores if score]
    if (names := common_objectives(done)) and all(trial.objectives for trial in done):
        return axes | {name: [round(trial.objectives[name], 5) for trial in done] for name in names}
    return axes | {"objective": [float(finished_objective(trial) or 0.0) for trial in done]} if done else {}


def to_script_json(content: object) -> str:
    """Return `content` as JSON that can be embedded in an HTML <script> element."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _trial_rows(trials: Sequence[Trial], reasons: Mapping[Path, str]) -> list[dict[str, Any]]:
    keys, rows = varied_settings(trials), []
    for number, trial in enumerate(trials):
        result, objective = trial.result or {}, finished_objective(trial)
        status = COMPLETED if objective is not None else PRUNED if is_pruned(trial) else FAILED
        rows.append({
            "number": number, "job": trial.folder.name, "status": status,
            "objective": objective, **({"objectives": values} if (values := trial.objectives) else {}),
            "steps": result.get("step"), "seconds": result.get("seconds"), "billed_usd": None,
            "reason": "" if objective is not None else reasons.get(trial.folder.resolve()) or _stored_reason(trial),
            **{key: trial.settings.get(key, "") for key in keys},
            **{name: round(score, 6) for name, score in read_scores(result.get("scores") or {}).items()}})
    return rows


def is_pruned(trial: Trial) -> bool:
    """Return whether a search has ended the run early, and the run was not continued to its end."""
    return not trial.finished and (trial.folder / PRUNED_FILE).is_file()


def _stored_reason(trial: Trial) -> str:
    """Return why a run that is not finished has ended, as far as its folder says so."""
    stored = atomic_files.read_object(trial.folder / PRUNED_FILE) or {}
    return str(stored.get("reason", sweep_results.SEE_OUTPUT))


def _failed_row(number: int, overrides: list[str], reason: str) -> dict[str, Any]:
    """Return the table row of a run that failed before it created its journal (metrics.jsonl)."""
    return {"number": number, "job": f"#{number}", "status": FAILED, "objective": None, "steps": None, "seconds": None,
            "billed_usd": None, "reason": reason,
            **dict(override.lstrip("+").partition("=")[::2] for override in overrides)}
