"""Measures the overhead of our training loop: python benchmarks/loop_overhead.py [--steps 60] [--write]

Two kinds of steps alternate in one process, with the same modules and optimizer, on batches of the tiny base:

- bare: forward, backward, clipping and fused AdamW on a prepared batch, in the ten lines of `bare_step`;
- ours: `loop.fit` as run.py calls it. A thread prepares the batches, the learning rate has a schedule, losses and
  gradient norm are read and checked one step later, and metrics are written to the journal.

The table contains the median wall time and CPU time of both kinds, and their quotients. EMA is off, because its
cost is not overhead of the loop.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from speed_table import describe_machine, write_section

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.recipe import resolve
from dreambooth.data.prefetch import Prefetcher
from dreambooth.runtime.engine import create_engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.tracking.run_tracker import track_run
from dreambooth.training.hooks import HookList, LogHook
from dreambooth.training.loop import fit
from dreambooth.training.setup import assemble
from dreambooth.training.step import train_step
from dreambooth.utils.console import Console

Clocks = tuple[float, float]  # seconds of wall time and of CPU time of all threads


def read_clocks() -> Clocks:
    return time.perf_counter(), time.process_time()


def bare_step(setup: Any, batch: Any) -> None:
    """Run one training step without our loop."""
    optimizer, schedule = setup.state.optimizer, setup.objective.noise_schedule
    alpha = schedule.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise
    errors = (setup.trained(noisy, batch.timesteps, batch.text) - batch.noise).square()
    loss = errors[:batch.num_instances].mean() + setup.objective.prior_loss_weight * errors[batch.num_instances:].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(setup.trained.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(steps: int, folder: Path) -> tuple[list[Clocks], list[Clocks]]:
    """Run both kinds of steps; return the durations of the bare steps and of our steps."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(compose("config", [
            f"run_root={folder}", "hardware=cpu", "tracking=none", "train.use_ema=false",
            f"train.max_train_steps={steps}", "prior.num_class_images=4", "prior.num_inference_steps=1",
            "sample.every=null", "evaluate.encoder=none"]))
    recipe = resolve(config, folder / "run")
    engine, accelerator = create_engine(recipe.device, recipe.precision.dtype)
    meter, console = MemoryMeter(engine.device), Console(quiet=True)
    setup = assemble(recipe, engine, accelerator, console, meter)
    [batch] = setup.batches(0)
    bare: list[Clocks] = []
    ours: list[Clocks] = []

    def record(durations: list[Clocks], start: Clocks) -> Clocks:
        end = read_clocks()
        durations.append((end[0] - start[0], end[1] - start[1]))
        return end

    step = partial(train_step, objective=setup.objective, engine=engine, max_grad_norm=recipe.train.max_grad_norm)
    with track_run(recipe, True) as tracker, console.bar("training", steps) as bar, \
            Prefetcher(setup.batches, steps) as prefetcher:
        hooks = HookList([LogHook(tracker, bar, meter)])
        start = read_clocks()
        for info in fit(setup.state, prefetcher, step, steps, hooks.due):
            hooks(info)
            start = record(ours, start)
            bare_step(setup, batch)
            start = record(bare, start)
    return bare, ours


def table_rows(bare: list[Clocks], ours: list[Clocks], warm_up: int = 5) -> list[str]:
    """Return the rows of a Markdown table with the medians of all steps after the first `warm_up`."""
    rows = ["| clock | bare, ms | ours, ms | ours / bare |", "|---|---|---|---|"]
    for number, clock in enumerate(("wall", "CPU")):
        without, with_loop = (median(durations[number] for durations in steps[warm_up:]) for steps in (bare, ours))
        rows.append(f"| {clock} | {1000 * without:.1f} | {1000 * with_loop:.1f} | {with_loop / without:.3f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [describe_machine(torch.get_num_threads()), "", *table_rows(*measure(options.steps, Path(folder)))]
    print("\n".join(rows))
    if options.write:
        write_section("loop", rows)


if __name__ == "__main__":
    sys.exit(main())
