"""What came of a sweep: a table on the terminal, a CSV file, and a run of its own in MLflow beside its trials."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreambooth.cloud.job import COMPLETED, FAILED, Job, Seen
from dreambooth.utils import atomic_files

FIRST = ("number", "job", "status", "objective", "steps", "seconds", "billed_usd", "reason")


def objective(seen: Seen) -> float | None:
    """Of a job that is done; None if it has none that is a number."""
    value = seen.result.get("objective") if seen.status == COMPLETED else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def settled(seen: Seen) -> Seen:
    """A job that ended well without a result has failed."""
    if seen.status == COMPLETED and objective(seen) is None:
        seen.status, seen.reason = FAILED, seen.result.get("problem") or "result.json names no objective"
    return seen


Points = dict[tuple[str, ...], tuple[Job, Seen]]  # overrides -> the job that ran them, and how it ended


def unlike(jobs: Sequence[Job], done: Points) -> list[Job]:
    """The jobs to run: a sweeper may ask for the same point twice, and it is paid for once."""
    return list({job.overrides: job for job in reversed(jobs) if job.overrides not in done}.values())[::-1]


def shared(jobs: Sequence[Job], ran: Sequence[Job], ends: Sequence[Seen], done: Points) -> tuple[list[Job], list[Seen]]:
    """All jobs asked for, those of a point that another one ran under that one's name and for nothing; what is done
    is remembered."""
    points = done | {job.overrides: (job, seen) for job, seen in zip(ran, ends, strict=True)}
    done |= {key: (job, seen) for key, (job, seen) in points.items() if seen.status == COMPLETED}
    found = [(job, *points[job.overrides]) for job in jobs]
    return ([replace(job, name=first.name) for job, first, _ in found],
            [seen if job is first else replace(seen, billed=0.0) for job, first, seen in found])


def rows(jobs: Sequence[Job], ends: Sequence[Seen]) -> list[dict[str, Any]]:
    """A row a job: how it ended, and its overrides in columns of their own."""
    found = []
    for job, seen in zip(jobs, ends, strict=True):
        usd = seen.usd(job) if seen.billed is not None else None
        overrides = dict(override.partition("=")[::2] for override in job.overrides)
        found.append({
            "number": job.number, "job": job.name, "status": seen.status, "objective": objective(seen),
            "steps": seen.result.get("step", seen.step), "seconds": seen.result.get("seconds"),
            "billed_usd": None if usd is None else round(usd, 4), "reason": seen.reason, **overrides})
    return found


def write(folder: Path, sweep: str, table: Sequence[dict[str, Any]]) -> Path:
    """`results-SWEEP.csv` in the folder; best first, what failed last."""
    keys = list(dict.fromkeys([*FIRST, *(key for row in table for key in row)]))
    ordered = sorted(table, key=lambda row: (row["objective"] is None, row["objective"] or 0.0, row["number"]))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(ordered)
    path = folder / f"results-{sweep}.csv"
    with atomic_files.whole_file(path) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")
    return path


def write_some(folder: Path, sweep: str, table: Sequence[dict[str, Any]]) -> Path | None:
    """The same of a sweep that nobody followed to its end; a file in which more have ended stays as it is."""
    path = folder / f"results-{sweep}.csv"
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            if sum(1 for _ in csv.DictReader(file)) > len(table):
                return None
    return write(folder, sweep, table) if table else None


def axes(table: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Parallel coordinates: what differs between the jobs, then the objective; a value a job that has one, best
    first."""
    done = sorted((row for row in table if row["objective"] is not None), key=lambda row: row["objective"])
    keys = [key for key in dict.fromkeys(key for row in done for key in row)
            if key not in FIRST and len({row.get(key, "") for row in done}) > 1]
    return {key.rpartition(".")[2]: [row.get(key, "") for row in done] for key in keys} | {
        "objective": [row["objective"] for row in done]}


def draw(folder: Path, sweep: str, columns: Mapping[str, Sequence[Any]]) -> Path:
    """`parallel_coordinates.json` of a sweep, from a column an axis."""
    path = folder / f"sweep-{sweep}" / "parallel_coordinates.json"
    atomic_files.write_json(path, {"sweep": sweep, "axes": {name: list(column) for name, column in columns.items()}})
    return path


def track(path: Path, sweep: str, table: Sequence[dict[str, Any]], kind: str, uri: str | None, experiment: str,
          run_root: Path, drawn: Path, *, here: bool = True) -> None:
    """The sweep as a run in MLflow, with the tag of its trials: the CSV, how many failed, the best objective.

    Args:
        drawn: the data of its parallel coordinates, kept beside the CSV.
        here: the run folders of the trials are on this machine.
    """
    from dreambooth.tracking.run_tracker import side_by_side
    from dreambooth.tracking.tracker import open_tracker

    done = [row for row in table if row["objective"] is not None]
    best = min(done, key=lambda row: row["objective"], default=None)
    tracker = open_tracker(kind, path.parent / f"sweep-{sweep}", run_root=run_root, run_name=f"sweep-{sweep}", uri=uri,
                           experiment=experiment)
    try:
        tracker.tags({"sweep": sweep, "kind": "sweep", "mlflow.note.content": (
            f"**A sweep of {len(table)}**: [its trials side by side]({side_by_side(sweep)}), curves and pictures.\n\n"
            + (f"- best: `{best['job']}`, objective {best['objective']:.4f}\n" if best else "")
            + f"- table: the artifact `{path.name}`, best first\n"
            + (f"- a page for people without access: `python -m dreambooth.compare sweep={sweep} run_root={run_root}`\n"
               f"- its best model as champion: `python -m dreambooth.promote sweep={sweep} run_root={run_root}`" if here
               else "- models: in the output of each job; with `evaluate.promote=true` each offers its own as champion")
        )})
        if best:
            tracker.params({"best_job": best["job"]})
            tracker.metrics(0, {"objective": best["objective"]})
        tracker.metrics(0, {"jobs": len(table), "failed": len(table) - len(done), "billed_usd": sum(
            row["billed_usd"] or 0.0 for row in table)})
        for file in (path, drawn):
            tracker.artifact(file)
    finally:
        tracker.close("FINISHED" if len(done) == len(table) else "FAILED")
