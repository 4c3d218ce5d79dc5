"""Part of `make proof`: runs a sweep with Hydra's basic sweeper and one with Optuna.

The section between the marks BEGIN and END of docs/proof-sweeps.md is replaced; search_comparison.py writes another one.
Each sweep trains the tiny base model in eight trials, and then the best model is promoted. The exit code is 1 if a sweep
fails, or if the promoted model is not the best of its trials.
"""

# ruff: noqa: E501  long lines of the page template
import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.proof.docs_section import write_section

ROOT = Path(__file__).parents[2]
SWEEPERS = {  # name -> overrides
    "Hydra's basic sweeper": (),
    "Optuna (TPE)": ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "hydra.sweeper.sampler.seed=0"),
}
OVERRIDES = ("hardware=cpu", "sample.every=null", "checkpoint.every=null")
TRIALS = 8
BEGIN, END = "<!-- sweeps: begin -->\n", "<!-- sweeps: end -->"
SECTION = """
Written by `python -m tools.proof.sweeps`, a part of `make proof`, on {date}. Each of two sweepers ran {trials} trials of
`sweep=tiny` with the shipped tiny base model and the demo subject, on two CPU cores. The objective is the class similarity minus
the subject similarity; lower is better. There is one training seed and one sampler seed, so the best point says little about other
subjects. The page shows that both searches run and end with a champion.

{sweeps}
"""


@dataclass
class Trial:
    """One trial of a sweep."""

    overrides: dict[str, str]
    objective: float
    run: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.sweeps", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof/sweeps")
    options = parser.parse_args()
    sections = []
    for number, (name, overrides) in enumerate(SWEEPERS.items()):
        folder = options.folder / str(number)
        start = time.monotonic()
        trials = run_sweep(folder, f"proof-{number}", overrides)
        promoted = promote(folder, f"proof-{number}")
        seconds = time.monotonic() - start
        best = min(trial.objective for trial in trials)
        if len(trials) != TRIALS or abs(promoted["objective"] - best) > 1e-6:
            raise SystemExit(f"{name}: {len(trials)} trials, best {best}, promoted {promoted['objective']}")
        sections.append(_format_section(name, trials, promoted, seconds))
        print(f"{name}: {TRIALS} trials, the best ({best:.4f}) is {promoted['alias']}, {seconds:.0f} s", flush=True)
    text = SECTION.format(date=time.strftime("%Y-%m-%d"), trials=TRIALS, sweeps="\n\n".join(sections))
    write_section(ROOT / "docs/proof-sweeps.md", BEGIN, END, text)
    print("wrote docs/proof-sweeps.md")


def run_sweep(folder: Path, sweep: str, overrides: tuple[str, ...]) -> list[Trial]:
    """Run a sweep with `python -m dreambooth.train -m`; return its trials in the order in which they ran."""
    command = [sys.executable, "-m", "dreambooth.train", "-m", "sweep=tiny", f"run_root={folder}",
               f"tracking.sweep={sweep}", *OVERRIDES, *overrides]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(process.stdout[-2000:] + process.stderr[-4000:])
    (folder / "log.txt").write_text(process.stdout, encoding="utf-8")
    objectives = [float(line.partition("=")[2]) for line in process.stdout.splitlines()
                  if line.startswith("objective=")]
    runs = {json.loads(path.read_text("utf-8"))["objective"]: path.parent for path in folder.glob("*/result.json")}
    trials = []
    for objective in objectives:
        run = min(runs.items(), key=lambda item: abs(item[0] - objective))[1]
        recorded = yaml.safe_load((run / ".hydra/overrides.yaml").read_text("utf-8"))
        point = dict(override.split("=", 1) for override in recorded if override.startswith(("train.", "prior.")))
        trials.append(Trial(point, objective, run.name))
    return trials


def promote(folder: Path, sweep: str) -> dict[str, Any]:
    """Promote the best model with `python -m dreambooth.promote`; return the contents of promoted.json."""
    command = [sys.executable, "-m", "dreambooth.promote", f"sweep={sweep}", f"run_root={folder}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(process.stdout + process.stderr)
    promoted: dict[str, Any] = json.loads((folder / "promoted.json").read_text("utf-8"))
    return promoted


def _format_section(name: str, trials: list[Trial], promoted: dict[str, Any], seconds: float) -> str:
    """Return the section of the page about one sweep."""
    keys = [key for key in trials[0].overrides if len({trial.overrides[key] for trial in trials}) > 1]
    lines = [f"## {name}", "", "| trial | " + " | ".join(f"`{key}`" for key in keys) + " | objective |",
             "|---" * (len(keys) + 2) + "|"]
    lines += [f"| {number} | " + " | ".join(trial.overrides[key] for key in keys)
              + f" | {trial.objective:.4f}{' **champion**' * (trial.run == promoted['run'])} |"
              for number, trial in enumerate(trials)]
    points = len({trial.run for trial in trials})
    repeated = "" if points == len(trials) else f", {points} different points: a repeated point is not trained again"
    return "\n".join([*lines, "", f"{len(trials)} trials in {seconds / 60:.0f} minutes{repeated}. Promoted: `{promoted['name']}` version "
                      f"{promoted['version']}, with an objective of {promoted['objective']:.4f} (`{promoted['objective_name']}`)."])


if __name__ == "__main__":
    main()
