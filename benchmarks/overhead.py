"""Measures what dreambooth adds to a training step and to the start of a process, and what its own forms of them gain.

    python benchmarks/overhead.py loop [--models tiny full sdxl_lora flow_lora] [--steps 60] [--write]
    python benchmarks/overhead.py start [--rounds 5] [--write]
    python benchmarks/overhead.py tuning [--write]
    python benchmarks/overhead.py spinning [--rounds 3] [--write]
    python benchmarks/overhead.py forms [--steps 60] [--write]

loop: two kinds of steps alternate in one process, with the same modules and optimizer, on the tasks of speed.py:

- bare: forward, backward, clipping and fused AdamW on a prepared batch, in the lines of `bare_step`;
- ours: `loop.fit` as run.py calls it. A thread prepares the batches, the learning rate has a schedule, losses and
  gradient norm are read and checked one step later, and metrics are written to the journal.

A step is divided by the bare step that follows it; the table has the medians. EMA is off, because its cost is not
overhead of the loop.

start: two processes alternate. One imports torch, and the classes of diffusers and transformers that the demo uses. The
other is the demo, until its first step has ended. The class images of the demo exist.

tuning: processes that train with the settings of runtime/cpu_tuning.py, and without one of them, alternate. The effect
of OpenMP's spinning is measured beside a process that uses one core.

spinning: the duration of a step for several values of GOMP_SPINCOUNT, alone and beside such a process.

forms: bare steps with a layer or a function of dreambooth, and with that of a library in its place, alternate in one
process.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from peers.ours import Ours
from peers.tasks import TASKS, Job
from peers.trials import run_trial
from process_monitor import run_monitored
from speed import ROOT, prepare
from speed_table import Trial, describe_machine, write_section
from timings import step_end_times
from torch import nn

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.data.prefetch import Prefetcher
from dreambooth.models.adapters.lora_linear import LoraLinear
from dreambooth.models.layers.rms_norm import LeanRMSNorm
from dreambooth.runtime import gradient_clipping
from dreambooth.runtime.engine import Engine, create_engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.tracking.run_tracker import track_run
from dreambooth.training.hooks import HookList, LogHook
from dreambooth.training.loop import fit
from dreambooth.training.setup import Setup, assemble
from dreambooth.training.step import train_step
from dreambooth.utils.console import Console

Clocks = tuple[float, float]  # seconds of wall time and of CPU time of all threads
CLOCKS = ("wall", "CPU")
# Task of speed.py -> steps of each kind
STEPS = {"tiny": 60, "tiny_lora": 60, "full": 6, "full_lora": 6, "sdxl_lora": 60, "flow_lora": 60}
LOOP = ("tiny", "full", "sdxl_lora", "flow_lora")
CLIPPING, LORA, NORMS = "clipping in AdamW's pass", "LoRA added in place", "RMS norms"
FORMS: tuple[tuple[str, type[nn.Module] | None, str], ...] = (  # form, class of layers, task
    (CLIPPING, None, "tiny"), (CLIPPING, None, "full"), (LORA, LoraLinear, "tiny_lora"),
    (LORA, LoraLinear, "full_lora"), (LORA, LoraLinear, "sdxl_lora"), (LORA, LoraLinear, "flow_lora"),
    (NORMS, LeanRMSNorm, "flow_lora"))
SPIN_COUNTS = (0, 1_000, 3_000, 10_000, 30_000, 300_000)  # values of GOMP_SPINCOUNT
TIMEOUT = 900.0  # seconds after which a process of `train` is ended
WARM_UP = 5  # steps that are not counted, at most a third of all
IMPORTS = ("import torch; from diffusers import AutoencoderKL, UNet2DConditionModel; "
           "from transformers import CLIPTextModel")



def spinning_for(iterations: int) -> dict[str, str]:
    """Return the environment variables with which idle OpenMP threads spin for this number of iterations."""
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(iterations)}


MALLOC, SPINNING = "malloc keeps freed memory", "threads sleep early beside a busy process"
WITHOUT = {  # a setting of cpu_tuning.py -> the environment variables without it
    MALLOC: {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"},  # a default of glibc: only the variable's name counts
    SPINNING: spinning_for(300_000)}  # libgomp's default
TUNING = (  # setting, task, steps, rounds
    (MALLOC, "tiny", 30, 5), (MALLOC, "full", 5, 2),
    (SPINNING, "tiny", 6, 5))  # a step without the setting takes up to 10 s


def read_clocks() -> Clocks:
    return time.perf_counter(), time.process_time()


def bare_step(setup: Any, batch: Any, clip: Callable[..., Any] = torch.nn.utils.clip_grad_norm_) -> None:
    """Run one training step without our loop.

    Args:
        clip: clips gradients; its arguments are the trained parameters and the limit of the norm.
    """
    optimizer, objective = setup.state.optimizer, setup.objective
    schedule, instances = objective.noise_schedule, batch.num_instances
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    more = () if batch.size_and_crop is None else (batch.size_and_crop,)
    prediction = setup.trained(noisy, schedule.denoiser_timesteps(batch.timesteps), batch.text, *more)
    errors = (prediction - schedule.target(batch.latents, batch.noise, batch.timesteps)).square()
    loss = errors[:instances].mean() + objective.prior_loss_weight * errors[instances:].mean()
    loss.backward()
    optimizer.grad_scale = None  # dreambooth's clipping sets it, also in the other kind of steps
    clip([p for p in setup.trained.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def assemble_task(name: str, steps: int, work: Path) -> tuple[Recipe, Engine, MemoryMeter, Console, Setup]:
    """Return what run.py makes of a task of speed.py before its first step. The folder of the run is empty."""
    task = replace(TASKS[name], steps=steps)
    prepare(task, work / name)
    out = work / name / "overhead"
    shutil.rmtree(out, ignore_errors=True)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = Ours("caches").words(Job(task, work / name, out, out / "log", steps))
        config = load(compose("config", [quoted(word) for word in words]))
    recipe = resolve(config, out / "run")
    engine, accelerator = create_engine(recipe.device, recipe.precision.dtype)
    meter, console = MemoryMeter(engine.device), Console(quiet=True)
    return recipe, engine, meter, console, assemble(recipe, engine, accelerator, console, meter)


def record(durations: list[Clocks], start: Clocks) -> Clocks:
    """Append the time since `start` to `durations`, and return the clocks."""
    end = read_clocks()
    durations.append((end[0] - start[0], end[1] - start[1]))
    return end


def measure_loop(name: str, steps: int, work: Path) -> tuple[list[Clocks], list[Clocks]]:
    """Run both kinds of steps of a task; return the durations of the bare steps and of our steps."""
    recipe, engine, meter, console, setup = assemble_task(name, steps, work)
    [batch] = setup.batches(0)
    bare: list[Clocks] = []
    ours: list[Clocks] = []

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


def measure_form(name: str, kind: type[nn.Module] | None, steps: int, work: Path) -> tuple[list[Clocks], list[Clocks]]:
    """Return the durations of the bare steps of a task without one of dreambooth's own forms, and with it.

    Args:
        kind: a class of layers, in place of which its base class is used; None: the clipping of gradients.
    """
    setup = assemble_task(name, 2 * steps, work)[-1]
    [batch] = setup.batches(0)
    layers = [] if kind is None else [layer for layer in setup.trained.modules() if type(layer) is kind]
    assert layers or kind is None
    plain: list[Clocks] = []
    ours: list[Clocks] = []
    for _ in range(steps):
        for durations in (plain, ours):
            for layer in layers:
                layer.__class__ = kind if durations is ours else kind.__base__
            start = read_clocks()
            if kind is None and durations is ours:
                bare_step(setup, batch, partial(gradient_clipping.clip, optimizer=setup.state.optimizer))
            else:
                bare_step(setup, batch)
            record(durations, start)
    return plain, ours


def quoted(word: str) -> str:
    """Return an override whose value is quoted for Hydra if it has spaces."""
    key, _, value = word.partition("=")
    return f'{key}="{value}"' if " " in value else word


def loop_rows(name: str, bare: list[Clocks], ours: list[Clocks]) -> list[str]:
    """Return the rows of a Markdown table: medians, and the median and quartiles of the quotients of neighbours.

    Args:
        name: the first columns.
        bare, ours: durations of the steps that are compared, in their order.
    """
    first = min(WARM_UP, len(bare) // 3)
    rows = []
    for number, clock in enumerate(CLOCKS):
        without, with_loop = ([durations[number] for durations in steps[first:]] for steps in (bare, ours))
        quotients = sorted(mine / other for mine, other in zip(with_loop, without, strict=True))
        low, high = quotients[len(quotients) // 4], quotients[-1 - len(quotients) // 4]
        rows.append(f"| {name} | {clock} | {len(quotients)} | {1000 * median(without):.1f} | "
                    f"{1000 * median(with_loop):.1f} | {median(quotients):.3f} | {low:.3f}-{high:.3f} |")
    return rows


def measure_start(rounds: int, folder: Path) -> tuple[list[Clocks], list[Clocks]]:
    """Start both kinds of processes alternately; return the wall and CPU seconds of the imports, and of the demo."""
    environment = dict(os.environ) | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    imports: list[Clocks] = []
    demos: list[Clocks] = []
    for number in range(rounds + 1):  # the first one makes the class images, and is not counted
        began = time.time()
        usage = run_monitored([sys.executable, "-c", IMPORTS], ROOT, environment, folder / "log")
        imports.append((usage.cpu_samples[-1][0] - began, usage.cpu_seconds))
        command = [sys.executable, "-m", "dreambooth.train", f"run_root={folder}", f"name=start{number}",
                   "train.max_train_steps=1", "sample.every=null", "evaluate.encoder=none"]
        usage = run_monitored(command, ROOT, environment, folder / "log")
        [run] = folder.glob(f"start{number}-*")
        end = step_end_times(run / "metrics.jsonl")[0]
        demos.append((end - usage.started, usage.cpu_seconds_until(end)))
    return imports[1:], demos[1:]


def start_rows(imports: list[Clocks], demos: list[Clocks]) -> list[str]:
    """Return a Markdown table with the medians, and with the median and the range of the differences."""
    rows = ["| clock | rounds | imports alone, s | until the first step of the demo, s | difference, s | range |",
            "|---|---|---|---|---|---|"]
    for number, clock in enumerate(CLOCKS):
        alone, whole = ([seconds[number] for seconds in kind] for kind in (imports, demos))
        more = [b - a for a, b in zip(alone, whole, strict=True)]
        rows.append(f"| {clock} | {len(more)} | {median(alone):.2f} | {median(whole):.2f} | {median(more):.2f} | "
                    f"{min(more):.2f}-{max(more):.2f} |")
    return rows


@contextmanager
def busy_neighbour(exists: bool) -> Iterator[None]:
    """Run a process that uses one core, if `exists`."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if exists else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def train(name: str, steps: int, number: int, environment: dict[str, str], work: Path) -> Clocks:
    """Train a task of speed.py in a process, and return the duration of a step.

    Args:
        number: number of the round.
        environment: environment variables, in addition to those of this process.

    Raises:
        SystemExit: the process has failed.
    """
    task = replace(TASKS[name], steps=steps)
    prepare(task, work / name)
    trial = Trial("tuning", name, number, threads=os.cpu_count() or 1)
    trial = run_trial(Ours("tuning", environment=environment), None, task, trial, work / name, TIMEOUT, False)
    if trial.images_per_second is None or trial.images_per_cpu is None:
        raise SystemExit(f"{name}: {trial.error}")
    return task.images / trial.images_per_second, task.images / trial.images_per_cpu


def measure_tuning(name: str, setting: str, steps: int, rounds: int, work: Path) -> list[tuple[float, float]]:
    """Return, for each round, the CPU seconds of a step without and with a setting of cpu_tuning.py."""
    with busy_neighbour(setting == SPINNING):
        return [(train(name, steps, number, WITHOUT[setting], work)[1], train(name, steps, number, {}, work)[1])
                for number in range(rounds)]


def tuning_row(name: str, setting: str, pairs: list[tuple[float, float]]) -> str:
    """Return a row of a Markdown table: medians, and the median and range of the gains within a round."""
    gains = [1 - tuned / plain for plain, tuned in pairs]
    plain, tuned = (median(pair[column] for pair in pairs) for column in (0, 1))
    return (f"| {setting} | {name} | {len(pairs)} | {plain:.3f} | {tuned:.3f} | {median(gains):.1%} | "
            f"{min(gains):.1%} to {max(gains):.1%} |")


def measure_spinning(rounds: int, work: Path) -> dict[bool, dict[int, list[float]]]:
    """Return the seconds of a step of `tiny` for each number of iterations that idle threads spin, one per round.

    The first key says whether another process uses one core.
    """
    seconds: dict[bool, dict[int, list[float]]] = {}
    for busy, steps in ((False, 30), (True, 6)):
        seconds[busy] = {count: [] for count in SPIN_COUNTS}
        with busy_neighbour(busy):
            for number in range(rounds):
                for count in SPIN_COUNTS:
                    seconds[busy][count].append(train("tiny", steps, number, spinning_for(count), work)[0])
    return seconds


def spinning_rows(seconds: dict[bool, dict[int, list[float]]]) -> list[str]:
    """Return a Markdown table: medians and ranges, in milliseconds."""
    rows = ["| ms per step | " + " | ".join(map(str, SPIN_COUNTS)) + " |", "|---" * (1 + len(SPIN_COUNTS)) + "|"]
    for busy, label in ((False, "alone"), (True, "beside a process that uses one core")):
        steps = [[1000 * value for value in values] for values in seconds[busy].values()]
        cells = [f"{median(ms):.0f} ({min(ms):.0f}-{max(ms):.0f})" for ms in steps]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    loop, start = commands.add_parser("loop"), commands.add_parser("start")
    loop.add_argument("--models", nargs="+", choices=STEPS, default=LOOP, help="tasks of speed.py")
    loop.add_argument("--steps", type=int, help="steps of each kind")
    start.add_argument("--rounds", type=int, default=5)
    forms = commands.add_parser("forms")
    forms.add_argument("--steps", type=int, help="steps of each kind")
    tuning, spinning = commands.add_parser("tuning"), commands.add_parser("spinning")
    spinning.add_argument("--rounds", type=int, default=3)
    for command in (loop, tuning, spinning, forms):
        command.add_argument("--work", type=Path, default=ROOT / "outputs" / "speed", help="folder of the base models")
    for command in (loop, start, tuning, spinning, forms):
        command.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    if options.what == "start":
        with tempfile.TemporaryDirectory() as folder:
            table = start_rows(*measure_start(options.rounds, Path(folder)))
    elif options.what == "tuning":
        table = ["| setting | task | rounds | CPU s per step without | CPU s per step with | gain | range |",
                 "|---|---|---|---|---|---|---|"]
        for setting, name, steps, rounds in TUNING:
            pairs = measure_tuning(name, setting, steps, rounds, options.work.absolute())
            table.append(tuning_row(name, setting, pairs))
            print(table[-1], flush=True)
    elif options.what == "spinning":
        table = spinning_rows(measure_spinning(options.rounds, options.work.absolute()))
    elif options.what == "forms":
        table = ["| form | task | clock | pairs of steps | without, ms | with, ms | with / without | quartiles |",
                 "|---|---|---|---|---|---|---|---|"]
        for form, kind, name in FORMS:
            steps = options.steps or STEPS[name]
            table += loop_rows(f"{form} | {name}", *measure_form(name, kind, steps, options.work.absolute()))
            print("\n".join(table[-2:]), flush=True)
    else:
        table = ["| task | clock | pairs of steps | bare, ms | ours, ms | ours / bare | quartiles |",
                 "|---|---|---|---|---|---|---|"]
        for name in options.models:
            table += loop_rows(name, *measure_loop(name, options.steps or STEPS[name], options.work.absolute()))
            print("\n".join(table[-2:]), flush=True)
    rows = [describe_machine(torch.get_num_threads()), "", *table]
    print("\n".join(rows))
    if options.write:
        write_section(options.what, rows, "performance.md")


if __name__ == "__main__":
    sys.exit(main())
