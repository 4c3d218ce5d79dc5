"""What our loop adds to the bare work: python benchmarks/loop_overhead.py [--steps 60] [--write]

Two kinds of step alternate in one process over the same modules and optimizer, on batches of the tiny base:

- bare: forward, backward, clipping, fused AdamW, written out in ten lines below, on a batch made beforehand;
- ours: `loop.fit` as run.py calls it: samples drawn in a thread and placed, the step with its schedule, losses and norm
  read a step late and checked, metrics journalled.

Reported: medians of both in wall and CPU time, and their quotients. EMA is off: it is work of its own, not overhead.
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
from speed_table import machine, put

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.recipe import resolve
from dreambooth.data.prefetch import Ahead
from dreambooth.runtime.engine import accelerated
from dreambooth.runtime.memory_meter import Meter
from dreambooth.tracking.run_tracker import tracked
from dreambooth.training.hooks import All, Log
from dreambooth.training.loop import fit
from dreambooth.training.setup import assemble
from dreambooth.training.step import train_step
from dreambooth.utils.console import Console
from dreambooth.utils.signals import Stop

Clocks = tuple[float, float]  # wall, CPU of all threads


def clocks() -> Clocks:
    return time.perf_counter(), time.process_time()


def bare(setup: Any, batch: Any) -> None:
    """The work itself, without us."""
    optimizer, schedule = setup.state.optimizer, setup.objective.noise_schedule
    alpha = schedule.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise
    errors = (setup.trained(noisy, batch.timesteps, batch.text) - batch.noise).square()
    loss = errors[:batch.instances].mean() + setup.objective.prior_loss_weight * errors[batch.instances:].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(setup.trained.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(steps: int, folder: Path) -> tuple[list[Clocks], list[Clocks]]:
    """Durations of bare and of our steps."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(compose("config", [
            f"run_root={folder}", "hardware=cpu", "tracking=none", "train.use_ema=false",
            f"train.max_train_steps={steps}", "prior.num_class_images=4", "prior.num_inference_steps=1",
            "sample.every=null", "evaluate.encoder=none"]))
    recipe = resolve(config, folder / "run")
    engine, accelerator = accelerated(recipe.device, recipe.precision.dtype)
    meter, console = Meter(engine.device), Console(quiet=True)
    setup = assemble(recipe, engine, accelerator, console, meter, Stop())
    [batch] = setup.batches(0)
    seen: tuple[list[Clocks], list[Clocks]] = [], []

    def timed(into: list[Clocks], began: Clocks) -> Clocks:
        ended = clocks()
        into.append((ended[0] - began[0], ended[1] - began[1]))
        return ended

    step = partial(train_step, objective=setup.objective, engine=engine, max_grad_norm=recipe.train.max_grad_norm)
    with tracked(recipe, True) as tracker, console.bar("training", steps) as bar, \
            Ahead(setup.batches, steps) as ahead:
        hooks = All([Log(tracker, bar, meter)])
        began = clocks()
        for info in fit(setup.state, ahead, step, steps, hooks.due):
            hooks(info)
            began = timed(seen[1], began)
            bare(setup, batch)
            began = timed(seen[0], began)
    return seen


def rows(seen: tuple[list[Clocks], list[Clocks]], warm: int = 5) -> list[str]:
    """A table of the medians, the first steps left out."""
    found = ["| clock | bare, ms | ours, ms | ours / bare |", "|---|---|---|---|"]
    for number, clock in enumerate(("wall", "CPU")):
        plain, ours = (median(times[number] for times in kind[warm:]) for kind in seen)
        found.append(f"| {clock} | {1000 * plain:.1f} | {1000 * ours:.1f} | {ours / plain:.3f} |")
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--steps", type=int, default=60)
    ask.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = ask.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [machine(torch.get_num_threads()), "", *rows(measure(given.steps, Path(folder)))]
    print("\n".join(found))
    if given.write:
        put("loop", found)


if __name__ == "__main__":
    sys.exit(main())
