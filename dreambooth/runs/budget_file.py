"""The hours that a run with a budget has used: in budget.json in its folder, and in its checkpoints.

A checkpoint has the hours too because another machine may continue the run from a checkpoint in S3.
"""

import time
from pathlib import Path

from dreambooth.runs.checkpoint_files import STATE_FILE
from dreambooth.utils import atomic_files

FILE = "budget.json"
CHECKPOINT_KEY = "budget_hours"  # in STATE_FILE


def write(run_dir: Path, hours: float, began: float | None = None) -> None:
    """Write budget.json.

    Args:
        hours: those of all sessions that have ended.
        began: when the present session began, in seconds since 1970; None: no session runs.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_files.write_json(run_dir / FILE, {"hours": hours} | ({} if began is None else {"began": began}))


def used_hours(run_dir: Path, checkpoint: Path | None = None) -> float:
    """Return the hours that a run has used, 0 for a run without budget.json.

    The last session of a run that was killed has not written its hours. It ended when its last metrics were written.

    Args:
        checkpoint: the checkpoint from which the run resumes, which may come from another machine; None: it begins.
    """
    record = atomic_files.read_object(run_dir / FILE) or {}
    hours, began = float(record.get("hours", 0.0)), record.get("began")
    metrics = run_dir / "metrics.jsonl"
    if began is not None and metrics.is_file():
        hours += max(0.0, metrics.stat().st_mtime - float(began)) / 3600
    state = {} if checkpoint is None else atomic_files.read_object(checkpoint / STATE_FILE) or {}
    return max(hours, float(state.get(CHECKPOINT_KEY, 0.0)))


def checkpoint_entry(run_dir: Path) -> dict[str, float]:
    """Return the entry of a checkpoint that is written now; {} if the run has no budget."""
    record = atomic_files.read_object(run_dir / FILE) or {}
    if (began := record.get("began")) is None:
        return {}
    return {CHECKPOINT_KEY: float(record.get("hours", 0.0)) + max(0.0, time.time() - float(began)) / 3600}
