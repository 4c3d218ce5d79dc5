"""`make proof`, sweeps: the tiny base searched by Hydra's basic sweeper and by Optuna, eight trials each, the best promoted.

Writes docs/proof-sweeps.md. Ends with 1 if a sweep fails, or if what is promoted is not the best of its trials.
"""

# ruff: noqa: E501  lines of the page
import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SWEEPERS = {
    "basic": (),
    "Optuna (TPE)": ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "hydra.sweeper.sampler.seed=0"),
}
WORDS = ("hardware=cpu", "sample.every=null", "checkpoint.every=null")
TRIALS = 8
PAGE = """# Proof: sweeps

Written by `python -m tools.proof.sweeps`, a part of `make proof`, on {date}. `sweep=tiny` on the shipped tiny base and the demo
subject, on two CPU cores: {trials} trials by each sweeper. The objective is minus the sum of
subject similarity and class similarity, each in the direction that is better, so lower is better. One training seed and one
sampler seed: which point is best says little about other subjects; that both searches run, and end in a champion, is what
is shown.

{sweeps}
"""


@dataclass
class Trial:
    """What one call of the sweeper gave."""

    overrides: dict[str, str]
    objective: float
    run: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.sweeps", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof/sweeps")
    asked = parser.parse_args()
    parts = []
    for number, (name, words) in enumerate(SWEEPERS.items()):
        folder = asked.folder / str(number)
        began = time.monotonic()
        trials = swept(folder, f"proof-{number}", words)
        said = promoted(folder, f"proof-{number}")
        seconds = time.monotonic() - began
        best = min(trial.objective for trial in trials)
        if len(trials) != TRIALS or abs(said["objective"] - best) > 1e-6:
            raise SystemExit(f"{name}: {len(trials)} trials, best {best}, promoted {said['objective']}")
        parts.append(_part(name, words, trials, said, seconds))
        print(f"{name}: {TRIALS} trials, the best ({best:.4f}) is {said['alias']}, {seconds:.0f} s", flush=True)
    page = PAGE.format(date=time.strftime("%Y-%m-%d"), trials=TRIALS, sweeps="\n\n".join(parts))
    (ROOT / "docs/proof-sweeps.md").write_text(page, encoding="utf-8")
    print("wrote docs/proof-sweeps.md")


def swept(folder: Path, sweep: str, words: tuple[str, ...]) -> list[Trial]:
    """A sweep through the door; its trials in their order, by what they print."""
    command = [sys.executable, "-m", "dreambooth.train", "-m", "sweep=tiny", f"run_root={folder}",
               f"tracking.sweep={sweep}", *WORDS, *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stdout[-2000:] + ran.stderr[-4000:])
    (folder / "log.txt").write_text(ran.stdout, encoding="utf-8")
    values = [float(line.partition("=")[2]) for line in ran.stdout.splitlines() if line.startswith("objective=")]
    found = {json.loads(path.read_text("utf-8"))["objective"]: path.parent for path in folder.glob("*/result.json")}
    trials = []
    for value in values:
        run = min(found.items(), key=lambda item: abs(item[0] - value))[1]
        record = yaml.safe_load((run / ".hydra/overrides.yaml").read_text("utf-8"))
        chosen = dict(word.split("=", 1) for word in record if word.startswith(("train.", "prior.")))
        trials.append(Trial(chosen, value, run.name))
    return trials


def promoted(folder: Path, sweep: str) -> dict[str, Any]:
    """The best, through the door."""
    command = [sys.executable, "-m", "dreambooth.promote", f"sweep={sweep}", f"run_root={folder}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stdout + ran.stderr)
    said: dict[str, Any] = json.loads((folder / "promoted.json").read_text("utf-8"))
    return said


def _part(name: str, words: tuple[str, ...], trials: list[Trial], said: dict[str, Any], seconds: float) -> str:
    keys = [key for key in trials[0].overrides if len({trial.overrides[key] for trial in trials}) > 1]
    lines = [f"## {name}", "", "| trial | " + " | ".join(f"`{key}`" for key in keys) + " | objective |",
             "|---" * (len(keys) + 2) + "|"]
    lines += [f"| {number} | " + " | ".join(trial.overrides[key] for key in keys)
              + f" | {trial.objective:.4f}{' **champion**' * (trial.run == said['run'])} |"
              for number, trial in enumerate(trials)]
    different = len({trial.run for trial in trials})
    again = "" if different == len(trials) else f", {different} different points: a point that is asked for again is there already"
    return "\n".join([*lines, "", f"{len(trials)} trials in {seconds / 60:.0f} minutes{again}. Promoted: `{said['name']}` version "
                      f"{said['version']}, {said['objective_name']} {said['objective']:.4f}."])


if __name__ == "__main__":
    main()
