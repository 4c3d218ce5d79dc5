"""Compares the time of a step with class images and with output preservation: python benchmarks/prior_kinds.py

Both kinds alternate in one process, two steps at a time, because with one photo every second step has a class row. LoRA
on the tiny base, one thread. The table contains the median CPU time of two steps of both kinds, and the median of the
quotients of neighbours. Words such as train.train_batch_size=1 are overrides of both runs.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.recipe import resolve
from dreambooth.models import loading
from dreambooth.runs import identity
from dreambooth.runtime.engine import create_engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.training.setup import assemble
from dreambooth.training.step import train_step
from dreambooth.utils.console import Console

KINDS = ("class_images", "output")
WARM_UP = 2  # pairs of steps of each kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps of each kind")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loading.import_libraries()
    identity.register_resolver()
    with tempfile.TemporaryDirectory() as folder:
        steps = [Steps(Path(folder), [f"prior.kind={kind}", *options.overrides]) for kind in KINDS]
        times = [[one.run() for one in steps] for _ in range(WARM_UP + options.steps)][WARM_UP:]
    images, output = (median(pair[number] for pair in times) for number in (0, 1))
    print("| class images, ms for 2 steps | output, ms for 2 steps | output / class images |\n|---|---|---|\n"
          f"| {1e3 * images:.1f} | {1e3 * output:.1f} | {median(pair[1] / pair[0] for pair in times):.2f} |")


class Steps:
    """A run that is ready to train, one step at a time."""

    def __init__(self, root: Path, overrides: list[str]) -> None:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = load(compose("config", ["hardware=cpu", "tracking=none", "evaluate.encoder=none", "method=lora",
                                             f"run_root={root}", "name=steps", *overrides]))
        recipe = resolve(config, root / "run")
        self.limit = recipe.train.max_grad_norm
        self.engine, accelerator = create_engine(recipe.device, recipe.precision.dtype)
        self.setup: Any = assemble(recipe, self.engine, accelerator, Console(quiet=True),
                                   MemoryMeter(self.engine.device, lambda phase: ""))

    def run(self) -> float:
        """Perform two steps, and return their CPU seconds."""
        setup, start = self.setup, time.process_time()
        for _ in range(2):
            train_step(setup.state, setup.batches(setup.state.step), setup.objective, self.engine, self.limit).check()
        return time.process_time() - start


if __name__ == "__main__":
    main()
