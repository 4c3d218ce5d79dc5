"""Rates of steps and class images, from the times at which they ended."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

WARM_UP_STEPS = 3  # not included in the speeds
Clock = Callable[[float], float]  # wall time in seconds -> the same value, or the CPU seconds until this moment


def wall_clock(moment: float) -> float:
    """Return `moment`: the Clock that measures wall time."""
    return moment


def step_end_times(path: Path) -> list[float]:
    """Read the times at which steps ended, in seconds since 1970, from the script's log or our metrics.jsonl.

    A missing file has no steps.
    """
    if not path.is_file():
        return []
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ours = [entry["time"] / 1000 for entry in entries if "loss" in entry.get("metrics", {})]
    return ours or [entry["time"] for entry in entries if entry.get("bar") == "Steps"]


def class_rate(folder: Path, clock: Clock = wall_clock) -> float | None:
    """Return the class images per second, from the end of the first batch to the end of the last one.

    The modification times of the files are the ends of the batches. None: there is only one batch.
    """
    times = sorted(path.stat().st_mtime for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
    gap = 0.5 * max((later - earlier for earlier, later in pairwise(times)), default=0.0)
    first = next((number for number, (earlier, later) in enumerate(pairwise(times), 1) if later - earlier > gap), None)
    return None if first is None else (len(times) - first) / (clock(times[-1]) - clock(times[first - 1]))


def step_seconds(end_times: list[float], clock: Clock = wall_clock) -> float | None:
    """Return the seconds of a step: the median over the steps after the warm-up.

    A step begins where the previous one ended. None: there are fewer than two steps.
    """
    durations = [clock(later) - clock(earlier) for earlier, later in pairwise(end_times)]
    counted = durations[min(WARM_UP_STEPS, len(durations) // 2):]
    return median(counted) if counted else None


def step_rate(end_times: list[float], images: int, clock: Clock = wall_clock) -> float | None:
    """Return the trained images per second (see `step_seconds`). None: there are fewer than two steps."""
    seconds = step_seconds(end_times, clock)
    return images / seconds if seconds else None
