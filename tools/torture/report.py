"""Writes docs/torture.md from the outcomes of all trials."""

import os
import platform
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD = """# Torture

Written by `make torture` on {date}: {count} trials in {minutes:.0f} minutes, Python {python}, {cores} CPU cores. Each
trial disturbs a short run of the shipped model, repeats the command without the disturbance, and compares the run with
an undisturbed one: final weights, training state, losses and samples. "Equal" means equal in every
bit. No trial printed a traceback.
"""


def write(page: Path, rows: list[tuple[str, str, str]], seconds: float) -> None:
    """Write the page.

    Args:
        rows: kind, name and outcome of each trial.
        seconds: duration of all trials.
    """
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for kind, name, outcome in rows:
        kinds[kind].append((name, outcome))
    text = HEAD.format(date=time.strftime("%Y-%m-%d"), count=len(rows), minutes=seconds / 60,
                       python=platform.python_version(), cores=os.cpu_count())
    for kind, trials in kinds.items():
        text += f"\n## {kind[0].upper()}{kind[1:]}\n\n"
        if kind.startswith("damage"):
            counts = Counter(outcome for _, outcome in trials)
            text += "| outcome | trials |\n|---|---|\n"
            text += "".join(f"| {_cell(outcome)} | {count} |\n" for outcome, count in counts.most_common())
        else:
            text += "| moment or cause | outcome |\n|---|---|\n"
            text += "".join(f"| {_cell(name)} | {_cell(outcome)} |\n" for name, outcome in trials)
    page.write_text(text, encoding="utf-8")


def _cell(text: str) -> str:
    """Without paths of this machine, and without the separator of a table."""
    return re.sub(r"/\S*/trial-\w+", "RUN_ROOT", text).replace(f"{ROOT}/", "").replace("|", "\\|")
