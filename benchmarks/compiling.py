"""Measures what train.compile=true costs before the first step, and what it gains in later steps.

    python benchmarks/compiling.py [--tasks tiny flow_lora] [--rounds 3] [--write]

In each round, three processes train a task of speed.py: without compiling (eager), with an empty folder of compiled
code (cold), and with the folder that the second process has filled (warm). The table has medians over the rounds.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from statistics import median

from peers.ours import Ours
from peers.tasks import TASKS
from peers.trials import run_trial
from speed import ROOT, prepare
from speed_table import Trial, describe_machine, write_section

CASES = {"eager": [], "cold": ["train.compile=true"], "warm": ["train.compile=true"]}
TIMEOUT = 900.0  # seconds after which a process is ended
HEAD = ["| task | case | rounds | first step, s | CPU s until then | step, ms | CPU ms | eager / compiled | range |",
        "|---|---|---|---|---|---|---|---|---|"]


def measure(name: str, rounds: int, work: Path) -> dict[str, list[Trial]]:
    """Run all cases of a task alternately, and return their trials.

    Raises:
        SystemExit: a process has failed.
    """
    task, compiled = TASKS[name], work / name / "compiled"
    prepare(task, work / name)
    trials: dict[str, list[Trial]] = {case: [] for case in CASES}
    for number in range(rounds):
        shutil.rmtree(compiled, ignore_errors=True)
        for case, overrides in CASES.items():
            (compiled / "headers").mkdir(parents=True, exist_ok=True)  # torch keeps its headers with temporary files
            trainer = Ours(case, *overrides, environment={"TORCHINDUCTOR_CACHE_DIR": str(compiled / "code"),
                                                          "TMPDIR": str(compiled / "headers")})
            trial = run_trial(trainer, None, task, Trial(case, name, number, threads=os.cpu_count() or 1), work / name,
                              TIMEOUT, False)
            if trial.error:
                raise SystemExit(f"{name}, {case}: {trial.error}")
            trials[case].append(trial)
            print(f"{name}, {case}: first step after {trial.first_step_s:.1f} s", flush=True)
    return trials


def rows(name: str, trials: dict[str, list[Trial]], images: int) -> list[str]:
    """Return the rows of a Markdown table: medians, and the quotient of the CPU time of a step within a round.

    Args:
        images: number of images per step.
    """
    table = []
    for case, measured in trials.items():
        rates = [(plain.images_per_cpu, trial.images_per_cpu)
                 for plain, trial in zip(trials["eager"], measured, strict=True)]
        gains = [rate / plain for plain, rate in rates if plain and rate]
        middle = [median(getattr(trial, field) for trial in measured)
                  for field in ("first_step_s", "first_step_cpu", "images_per_second", "images_per_cpu")]
        table.append(f"| {name} | {case} | {len(measured)} | {middle[0]:.1f} | {middle[1]:.1f} | "
                     f"{1000 * images / middle[2]:.0f} | {1000 * images / middle[3]:.0f} | "
                     + ("1 | |" if case == "eager" else f"{median(gains):.2f}x | {min(gains):.2f}-{max(gains):.2f} |"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["tiny", "flow_lora"], help="tasks of speed.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "speed", help="folder of the base models")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    table = [describe_machine(os.cpu_count() or 1), "", *HEAD]
    for name in options.tasks:
        table += rows(name, measure(name, options.rounds, options.work.absolute()), TASKS[name].images)
    print("\n".join(table))
    if options.write:
        write_section("compiling", table, "performance.md")


if __name__ == "__main__":
    sys.exit(main())
