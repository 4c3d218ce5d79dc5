"""Collects the results of a sweep's jobs, and writes them to a CSV file and to a separate MLflow run.

The table of a sweep has one row per job. If the runs have several objectives, the entry `objectives` of a row contains
their values by name; the CSV file has a column for each, and the column `pareto`.
"""

import csv
import io
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreambooth.cloud.job import COMPLETED, FAILED, PRUNED, Job, JobState
from dreambooth.config.enums import Direction
from dreambooth.config.evaluate import better_direction, read_objective
from dreambooth.utils import atomic_files, markdown, quoting
from dreambooth.utils.key_names import short_names
from dreambooth.utils.masking import mask_urls
from dreambooth.utils.plurals import counted

SEE_OUTPUT = "see the error in the output of the run"  # column `reason` of a failed run in this process
FIXED_COLUMNS = ("number", "job", "status", "objective", "steps", "seconds", "billed_usd", "reason")
Results = dict[tuple[str, ...], tuple[Job, JobState]]  # overrides -> the job that ran them, and its final state


def objective(state: JobState) -> float | None:
    """Return the objective of a job, which is the number that the sweep minimises. Of several, the first one counts.

    Return None if the job is not completed, or if an objective is missing or not finite.
    """
    return None if returned_value(state) is None else float(state.result["objective"])


def returned_value(state: JobState) -> float | list[float] | None:
    """Return what the sweeper reads from a job: its objective, or a list of several; None as in `objective`."""
    return read_objective(state.result) if state.status == COMPLETED else None


def fail_without_objective(state: JobState) -> JobState:
    """Mark a completed job as failed if it has no objective. Change `state` in place and return it."""
    if state.status == COMPLETED and objective(state) is None:
        state.status, state.reason = FAILED, state.result.get("problem") or "result.json names no objective"
    return state


def jobs_to_run(jobs: Sequence[Job], done: Results) -> list[Job]:
    """Return the jobs without duplicates, and without jobs that already have a result.

    Jobs with the same overrides are duplicates. They exist because a sweeper may suggest the same overrides twice.
    Only the first of them is run and paid for.
    """
    return list({job.overrides: job for job in reversed(jobs) if job.overrides not in done}.values())[::-1]


def share_results(jobs: Sequence[Job], ran: Sequence[Job], states: Sequence[JobState],
                  done: Results) -> tuple[list[Job], list[JobState]]:
    """Assign a result to every job, including jobs that jobs_to_run removed.

    A removed job gets the name and result of the job that ran with the same overrides, and a cost of 0.

    Args:
        jobs: all jobs that the sweeper suggested.
        ran: the jobs that ran, as returned by jobs_to_run.
        states: final states of the jobs in `ran`.
        done: results of the jobs that completed in earlier calls. This function adds the results of the jobs in `ran`
            that completed.

    Returns:
        The jobs and their final states, both in the order of `jobs`.
    """
    results = done | {job.overrides: (job, state) for job, state in zip(ran, states, strict=True)}
    done |= {overrides: (job, state) for overrides, (job, state) in results.items() if state.status == COMPLETED}
    shared = [(job, *results[job.overrides]) for job in jobs]
    return ([replace(job, name=runner.name) for job, runner, _ in shared],
            [state if job is runner else replace(state, billed_seconds=0.0) for job, runner, state in shared])


def result_rows(jobs: Sequence[Job], states: Sequence[JobState]) -> list[dict[str, Any]]:
    """Return the results table with one row per job. The columns are FIXED_COLUMNS and the keys of the overrides."""
    rows = []
    for job, state in zip(jobs, states, strict=True):
        cost = state.cost_usd(job) if state.billed_seconds is not None else None
        overrides = dict(override.partition("=")[::2] for override in job.overrides)
        rows.append({
            "number": job.number, "job": job.name, "status": state.status, "objective": objective(state),
            **({"objectives": state.result["objectives"]} if state.result.get("objectives") else {}),
            "steps": state.result.get("step", state.step), "seconds": state.result.get("seconds"),
            "billed_usd": None if cost is None else round(cost, 4), "reason": state.reason, **overrides})
    return rows


def write_table(folder: Path, sweep: str, table: Sequence[dict[str, Any]]) -> Path:
    """Write a results table to `results-SWEEP.csv` in a folder, and return the path.

    SWEEP stands for the argument `sweep`. Rows are sorted by objective, best (lowest) first. Rows without an objective
    come last. With several objectives, the rows of the Pareto front come first.
    """
    front = {row["number"] for row in front_rows(table)}
    ordered = [_with_columns(row, row["number"] in front) if front else row for row in sorted(table, key=lambda row: (
        row["number"] not in front, row["objective"] is None, row["objective"] or 0.0, row["number"]))]
    keys = list(dict.fromkeys([*FIXED_COLUMNS, *(key for row in ordered for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: mask_urls(value) if isinstance(value, str) else value for key, value in row.items()}
                     for row in ordered)
    path = folder / f"results-{sweep}.csv"
    with atomic_files.write_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    return path


def front_rows(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows on the Pareto front, the best by the first objective first; [] as in `find_front`."""
    on_front = find_front([(row.get("objectives") or {}) if row["objective"] is not None else {} for row in table])
    return sorted((table[i] for i in on_front), key=lambda row: float(row["objective"]))


def find_front(objectives: Sequence[Mapping[str, float]]) -> list[int]:
    """Return which runs are on the Pareto front, as indices; [] with less than two objectives, or if they differ.

    Args:
        objectives: of each run, by name; {} for a run that is not finished. A run with a value that is not finite
            counts as such a run.
    """
    done = [i for i, values in enumerate(objectives) if values and all(map(math.isfinite, values.values()))]
    if len(names := {tuple(objectives[i]) for i in done}) != 1:
        return []
    directions = [better_direction(name) for name in names.pop()]
    on_front = pareto_front([list(objectives[i].values()) for i in done], directions)
    return [i for i, on in zip(done, on_front, strict=True) if on]


def pareto_front(points: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[bool]:
    """Return for each point whether it is on the Pareto front: no other point dominates it.

    A point dominates another one if it is at least as good in each objective, and better in one (Deb et al. 2002, "A
    fast and elitist multiobjective genetic algorithm: NSGA-II", section III). Equal points do not dominate each other.

    Args:
        points: the objectives of each point, in the order of `directions`.
        directions: in which each objective becomes better.
    """
    signs = [1 if direction is Direction.max else -1 for direction in directions]
    signed = [[sign * value for sign, value in zip(signs, point, strict=True)] for point in points]
    front: list[list[float]] = []
    on_front = [False] * len(points)
    # A point can only be dominated by one that is before it in this order, and then by one of the front. Of the front
    # of two objectives, the last point has the best second value.
    for i in sorted(range(len(points)), key=signed.__getitem__, reverse=True):
        point, rivals = signed[i], front[-1:] if len(directions) == 2 else front
        on_front[i] = not any(rival != point and all(map(operator.ge, rival, point)) for rival in rivals)
        if on_front[i]:
            front.append(point)
    return on_front


def describe_front(table: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines for the terminal that list the Pareto front; [] with less than two objectives."""
    if not (front := front_rows(table)):
        return []
    directions = {name: better_direction(name) for name in front[0]["objectives"]}
    better = ", ".join(f"{name} ({'higher' if direction is Direction.max else 'lower'} is better)"
                       for name, direction in directions.items())
    finished = sum(row["objective"] is not None for row in table)
    return [f"Pareto front: {len(front)} of {counted(finished, 'finished run')} by {better}",
            *(f"  {row['job']}  {_format_objectives(row)}" for row in front)]


def _format_objectives(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in row["objectives"].items())


def _with_columns(row: Mapping[str, Any], on_front: bool) -> dict[str, Any]:
    """Return a row of a table of several objectives with a column for each, and the column `pareto`."""
    values = row.get("objectives") or {}
    return {key: value for key, value in row.items() if key != "objectives"} | values | {
        "pareto": "front" if on_front else ""}


def write_partial_table(folder: Path, sweep: str, table: Sequence[dict[str, Any]]) -> Path | None:
    """Call write_table for a sweep whose jobs have not all ended, and return the path of the results table.

    If the results table exists and has more rows than `table`, or if `table` is empty, write nothing and return None.
    """
    path = folder / f"results-{sweep}.csv"
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            if sum(1 for _ in csv.DictReader(file)) > len(table):
                return None
    return write_table(folder, sweep, table) if table else None


def parallel_axes(table: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the axes of a parallel coordinates plot: the overrides that differ between jobs, then the objective.

    Each axis is a list with one value per job that has an objective. Jobs are sorted by objective, best first.
    """
    done = sorted((row for row in table if row["objective"] is not None), key=lambda row: row["objective"])
    keys = [key for key in dict.fromkeys(key for row in done for key in row)
            if key not in (*FIXED_COLUMNS, "objectives") and len({row.get(key, "") for row in done}) > 1]
    names = list(dict.fromkeys(name for row in done for name in row.get("objectives") or ())) or ["objective"]
    return {name: [row.get(key, "") for row in done] for key, name in short_names(keys).items()} | {
        name: [row["objective"] if name == "objective" else row.get("objectives", {}).get(name, "") for row in done]
        for name in names}


def write_parallel_coordinates(folder: Path, sweep: str, axes: Mapping[str, Sequence[Any]]) -> Path:
    """Write the result of parallel_axes to `sweep-SWEEP/parallel_coordinates.json` in a folder, and return the path."""
    path = folder / f"sweep-{sweep}" / "parallel_coordinates.json"
    atomic_files.write_json(path, {"sweep": sweep, "axes": {
        name: [mask_urls(value) if isinstance(value, str) else value for value in values]
        for name, values in axes.items()}})
    return path


def next_commands(sweep: str, run_root: Path, table: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Return the commands that write the comparison page of a sweep and that promote its best model.

    With several objectives, the rule of the second command has the values of the run in the middle of the front.
    """
    options, rule = {"sweep": sweep, "run_root": str(run_root)}, {}
    if front := front_rows(table):
        values = list(front[len(front) // 2]["objectives"].items())[1:]
        rule = {"rule": ",".join(_condition(name, value) for name, value in values)}
    return [quoting.command("compare", options), quoting.command("promote", options | rule)]


def _condition(name: str, value: float) -> str:
    """Return the condition of a rule with a rounded bound that a run with this value of an objective satisfies."""
    least = better_direction(name) is Direction.max
    text = f"{(math.floor if least else math.ceil)(value * 1e4) / 1e4:g}"
    satisfied = float(text) <= value if least else value <= float(text)
    return f"{name}{'>=' if least else '<='}{text if satisfied else repr(value)}"


def log_sweep(table_path: Path, sweep: str, table: Sequence[dict[str, Any]], kind: str, uri: str | None,
              experiment: str, run_root: Path, plot: Path, *, local: bool = True) -> None:
    """Log the results table, job counts and best objective of a sweep to a separate MLflow run.

    If the sweep is continued under its name, the numbers of this call are logged as the next step, because MLflow shows
    the values of the last step. The best job is a tag, because MLflow never changes a parameter.

    Each job of the sweep has an MLflow run of its own. The separate run and the runs of the jobs have the same value of
    the tag `sweep`.

    Args:
        table_path: the CSV file that contains `table`.
        kind: the setting tracking.kind.
        plot: the file that write_parallel_coordinates has written.
        local: whether the run folders of the jobs are on this machine.
    """
    from dreambooth.tracking.journal import read
    from dreambooth.tracking.run_tracker import trials_link
    from dreambooth.tracking.tracker import open_tracker

    done = [row for row in table if row["objective"] is not None]
    pruned, front = sum(row["status"] == PRUNED for row in table), front_rows(table)
    best = None if front else min(done, key=lambda row: row["objective"], default=None)
    metrics = {"jobs": len(table), "failed": len(table) - len(done) - pruned, "billed_usd": sum(
        row["billed_usd"] or 0.0 for row in table)} | ({"objective": best["objective"]} if best else {}) | (
        {"pareto_front": len(front)} if front else {})
    folder = table_path.parent / f"sweep-{sweep}"
    logged = [entry for entry, _ in read(folder / "metrics.jsonl") if "metrics" in entry]
    tracker = open_tracker(kind, folder, run_root=run_root, run_name=f"sweep-{sweep}", uri=uri, experiment=experiment)
    try:
        tracker.set_tags({"sweep": sweep, "kind": "sweep", "mlflow.note.content": (
            f"**A sweep of {len(table)}**: [its trials side by side]({trials_link(sweep)}), curves and pictures.\n\n"
            + (f"- best: `{best['job']}`, objective {best['objective']:.4f}\n" if best else "")
            + "".join(f"- Pareto front: `{row['job']}`, {_format_objectives(row)}\n" for row in front)
            + f"- table: the artifact `{table_path.name}`, best first\n"
            + ("- a page for people without access, and its best model as champion:\n\n"
               + markdown.code_block("\n".join(next_commands(sweep, run_root, table))) if local else
               "- models: in the output of each job; with `evaluate.promote=true` each registers its own as champion")
        )} | ({"best_job": best["job"]} if best else {}))
        if not logged or logged[-1]["metrics"] != metrics:
            tracker.log_metrics(logged[-1]["step"] + 1 if logged else 0, metrics)
        for path in (table_path, plot):
            tracker.log_artifact(path)
    finally:
        tracker.close("FINISHED" if len(done) + pruned == len(table) else "FAILED")
