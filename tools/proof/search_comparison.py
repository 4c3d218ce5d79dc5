"""Part of `make proof`: compares a pruned search of Optuna with a grid that has the same number of trials.

For each seed, both search the same ranges with TRIALS trials of the tiny base model, one after the other in one
process. The page shows the best objective of each, and the CPU seconds that it took. These contain every attempt:
trials that were pruned, and processes that were killed. The command may be killed and repeated: trials that have ended
are not run again.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dreambooth.utils import atomic_files
from tools.proof.docs_section import format_table, write_section

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- search comparison: begin -->\n", "<!-- search comparison: end -->"
TRIALS, SEEDS = 40, (4, 5, 6)  # the settings were chosen with other seeds, see the page
COMMON = ("hardware=cpu", "tracking=none", "tracking.sweep=comparison", "sample.every=null", "checkpoint.every=null",
          "method=lora", "method.rank=8", "train.max_train_steps=48", "train.train_batch_size=1",
          "prior.with_prior_preservation=false", "dataset.validation_count=1", "train.validate_every=12",
          "evaluate.encoder=none", "evaluate.objective=validation_loss",
          "hydra/sweeper=optuna", f"hydra.sweeper.n_trials={TRIALS}", "hydra.sweeper.n_jobs=1")
GRID = ("hydra/sweeper/sampler=grid", "train.learning_rate=choice(1e-5,1e-4,1e-3,1e-2,1e-1)",
        "optimizer.beta1=choice(0.8,0.95)", "optimizer.beta2=choice(0.95,0.999)",
        "optimizer.weight_decay=choice(1e-3,1e-1)")
SEARCH = ("hydra/sweeper/sampler=tpe", "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_warmup_steps=12",
          "train.learning_rate=tag(log,interval(1e-5,1e-1))", "optimizer.beta1=interval(0.8,0.95)",
          "optimizer.beta2=interval(0.95,0.999)", "optimizer.weight_decay=tag(log,interval(1e-3,1e-1))")
COLUMNS = ("| seed | grid: best | CPU seconds | pruned search: best | CPU seconds | part of the grid's | trials pruned "
           "| CPU seconds until better than the grid | part of the grid's |")


class CpuRecord(Callback):
    """Hydra callback that records the CPU seconds of a sweep in `folder`, of all its processes together.

    A process writes its CPU seconds every half second, so that almost none are lost if it is killed.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.own = self.folder / f"cpu-{os.getpid()}-{time.time_ns()}.json"

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        def write_forever() -> None:
            while True:
                atomic_files.write_json(self.own, time.process_time())
                time.sleep(0.5)

        threading.Thread(target=write_forever, daemon=True).start()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        value = job_return._return_value if job_return.status is JobStatus.COMPLETED else None
        others = sum(json.loads(path.read_text("utf-8")) for path in self.folder.glob("cpu-*.json")
                     if path != self.own)
        line = {"number": config.hydra.job.num, "failed": value is None, "cpu": others + time.process_time(),
                "objective": value if value is not None and math.isfinite(value) else None}
        with (self.folder / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class Sweep:
    """What a sweep has found.

    Attributes:
        objectives: of each trial, in their order; None: the trial was pruned or has failed.
        cpu: CPU seconds of the sweep at the end of each trial.
        pruned: number of pruned trials.
    """

    objectives: list[float | None]
    cpu: list[float]
    pruned: int

    @property
    def best(self) -> float:
        return min(value for value in self.objectives if value is not None)

    def cpu_until_below(self, bound: float) -> float | None:
        """Return the CPU seconds after which an objective below `bound` was found; None: none was."""
        return next((cpu for value, cpu in zip(self.objectives, self.cpu, strict=True)
                     if value is not None and value < bound), None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.search_comparison", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/proof/search")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS,
                        help="others than the default write no page")
    options = parser.parse_args()
    rows, won = [], []
    for seed in options.seeds:
        grid = run_sweep(options.folder.resolve() / f"grid-{seed}", seed, GRID)
        search = run_sweep(options.folder.resolve() / f"search-{seed}", seed,
                           (*SEARCH, f"hydra.sweeper.sampler.seed={seed}"))
        until = search.cpu_until_below(grid.best)
        won.append(until is not None and until <= grid.cpu[-1] / 2)
        rows.append(f"| {seed} | {grid.best:.4f} | {grid.cpu[-1]:.0f} | {search.best:.4f} | {search.cpu[-1]:.0f} | "
                    f"{search.cpu[-1] / grid.cpu[-1]:.0%} | {search.pruned} | "
                    + (f"{until:.0f} | {until / grid.cpu[-1]:.0%} |" if until is not None else "never | - |"))
        print(rows[-1], flush=True)
    verdict = (f"The pruned search found a better objective than the whole grid in at most half of the grid's CPU "
               f"seconds for {sum(won)} of {len(won)} seeds.")
    if tuple(options.seeds) == SEEDS:
        table = format_table(f"{TRIALS} trials per sweep, one process of one thread", COLUMNS, rows)
        write_section(ROOT / "docs/proof-sweeps.md", BEGIN, END, f"{table}\n{verdict}\n")
    print(verdict)


def run_sweep(folder: Path, seed: int, overrides: tuple[str, ...]) -> Sweep:
    """Run a sweep, or continue it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dreambooth.train", "-m", *COMMON, *overrides, f"train.seed={seed}",
               f"run_root={folder}", f"+hydra.callbacks.cpu._target_={__spec__.name}.{CpuRecord.__name__}",
               f"+hydra.callbacks.cpu.folder={folder}"]
    record = folder / "trials.jsonl"
    if len(_read(record)) < TRIALS:
        process = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                                 text=True, check=False)
        if process.returncode:
            print(process.stdout[-1000:] + process.stderr[-2000:], file=sys.stderr)  # trials may fail: they diverge
    lines = _read(record)
    if len(lines) != TRIALS:
        raise SystemExit(f"{folder}: {len(lines)} trials have ended: repeat the command")
    return Sweep([line["objective"] for line in lines], [line["cpu"] for line in lines],
                 sum(line["objective"] is None and not line["failed"] for line in lines))


def _read(record: Path) -> list[dict[str, Any]]:
    """Return the last line of each trial, in the order of their numbers."""
    if not record.exists():
        return []
    lines = [json.loads(line) for line in record.read_text("utf-8").splitlines() if line.endswith("}")]
    return [line for _, line in sorted({line["number"]: line for line in lines}.items())]


if __name__ == "__main__":
    main()
