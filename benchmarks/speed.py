"""Compares the training speed of dreambooth with that of other trainers, which run from checkouts.

    python benchmarks/speed.py --diffusers CHECKOUT --kohya CHECKOUT --onetrainer CHECKOUT --mgds CHECKOUT \
        --simpletuner CHECKOUT --write

All trainers run alternately, one process at a time, on the CPU. Each process appends one line to
WORK/TASK/trials.jsonl, and the tables summarise all lines of these files. All trainers read the same fp32 weights, the
same photos and the same class images, and use the same number of threads, with AdamW, a batch of n photos and n class
images, and clipping at 1, without EMA, samples, evaluation or trackers. Speeds are medians over the steps after the
first three. A peer has an environment of its own, which the command makes. What a peer cannot do is said in the table,
with its error.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from peers.environments import make_environment
from peers.hf_scripts import DiffusersScripts
from peers.kohya import Kohya
from peers.one_trainer import OneTrainer
from peers.ours import Ours
from peers.plan import Plan
from peers.simple_tuner import SimpleTuner
from peers.tasks import TASKS, NotSupported, Task, Trainer, base_folder
from peers.trials import run_trial
from speed_table import (
    CLASS_IMAGE_CASES,
    SAME_GUIDANCE,
    Trial,
    append_trial,
    describe_machine,
    format_number,
    format_table,
    write_section,
)

HERE = Path(__file__).parent
ROOT = HERE.parent
OUR_CASES = {  # case -> overrides in addition to the common ones
    "same work": ["memory.cache_latents=false"],
    "caches": [],
    "compiled": ["train.compile=true"],
    "channels last": ["train.channels_last=true"],
    "caches and EMA": ["train.use_ema=true"],
    "class images": [],
    SAME_GUIDANCE: ["prior.guidance_scale=7.5"],
}
DEFAULT_CASES = ("same work", "caches")


def find_trainers(options: argparse.Namespace) -> dict[str, Trainer]:
    """Return the trainers of all cases by name: the peers with a checkout, and the cases of dreambooth."""
    found: list[Trainer] = []
    if options.diffusers:
        scripts = [DiffusersScripts(options.diffusers.resolve()) for _ in range(2)]
        scripts[1].name = "diffusers class images"
        found += scripts
    if options.kohya:
        found.append(Kohya(options.kohya.resolve()))
    if options.onetrainer and options.mgds:
        found.append(OneTrainer(options.onetrainer.resolve(), options.mgds.resolve()))
    if options.simpletuner:
        found.append(SimpleTuner(options.simpletuner.resolve(), options.simpletuner_python))
    found += [Ours(name, *overrides) for name, overrides in OUR_CASES.items()]
    return {trainer.name: trainer for trainer in found}


def prepare(task: Task, work: Path) -> None:
    """Create the fp32 weights, photos and class images that all trainers read. `work` is the folder of the task."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "dreambooth" / "assets" / "demo", work / "photos", dirs_exist_ok=True,
                    ignore=lambda _, names: [name for name in names if not name.endswith(".png")])
    photos = sorted((work / "photos").glob("*.png"))
    (work / "class").mkdir(exist_ok=True)
    for number in range(task.class_images):  # their content has no effect on the speed
        shutil.copy(photos[number % len(photos)], work / "class" / f"{number}.png")
    base = base_folder(task, work)
    if not base.is_dir():
        part = base.with_name(f"{base.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run([sys.executable, str(HERE / "make_base.py"), task.base, str(part)], check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})
        part.rename(base)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, title in (("diffusers", "huggingface/diffusers"), ("kohya", "kohya-ss/sd-scripts"),
                        ("onetrainer", "Nerogar/OneTrainer"), ("mgds", "Nerogar/mgds, which OneTrainer needs"),
                        ("simpletuner", "bghira/SimpleTuner")):
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT", help=title)
    parser.add_argument("--simpletuner-python", type=Path, metavar="PYTHON",
                        help="interpreter for SimpleTuner, which needs Python 3.12; default: that of this environment")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--cases", nargs="+", help="names of peers, and of our cases: " + ", ".join(OUR_CASES)
                        + f"; default: all peers, {', '.join(DEFAULT_CASES)}")
    parser.add_argument("--rounds", type=int, help="each round runs every case once; default: depends on the task")
    parser.add_argument("--steps", type=int, help="training steps per process; default: depends on the task")
    parser.add_argument("--making", type=int, default=64, help="class images that a class image case generates")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=15.0, help="minutes after which a process is ended")
    parser.add_argument("--without-resume", action="store_true", help="do not measure checkpoints and resuming")
    parser.add_argument("--plan", action="store_true", help="print what would run and how long it takes, and stop")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "speed",
                        help="folder that all trainers read and write")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/benchmarks.md")
    options = parser.parse_args()
    options.trainers = find_trainers(options)
    default = [name for name in options.trainers if name not in OUR_CASES and name not in CLASS_IMAGE_CASES]
    options.cases = options.cases or [*default, *DEFAULT_CASES]
    if unknown := set(options.cases) - options.trainers.keys():
        parser.error(f"no trainer for {', '.join(sorted(unknown))}: name its checkout")
    return options


def main() -> None:
    options = read_options()
    plans = {name: plan_task(name, options) for name in options.tasks}
    for plan in plans.values():
        print(plan.describe())
    print(f"in total about {sum(plan.seconds() for plan in plans.values()) / 60:.0f} minutes", flush=True)
    if options.plan:
        return
    environments: dict[str, Path] = {}
    refused: dict[str, str] = {}
    for name in dict.fromkeys(case for plan in plans.values() for case, _ in plan.pending if case not in OUR_CASES):
        try:
            environments[name] = make_environment(options.trainers[name], options.work.absolute() / "environments")
        except NotSupported as error:
            refused[name] = str(error)
    for name, plan in plans.items():
        work = (options.work / name).absolute()
        if plan.pending:
            prepare(plan.task, work)
        failed: set[str] = set()
        for case, number in plan.pending:
            if case not in failed:
                trial = measure(case, number, name, plan.task, work, options, environments.get(case), refused)
                append_trial(work / "trials.jsonl", trial)
                if trial.error:
                    failed.add(case)  # the next rounds would end in the same error
        rows = [describe_machine(options.threads), "", *format_table(plan.measured())]
        print("\n".join(rows))
        if options.write:
            write_section(name, rows)


def plan_task(name: str, options: argparse.Namespace) -> Plan:
    task = TASKS[name]
    task = replace(task, steps=options.steps or task.steps, rounds=options.rounds or task.rounds,
                   resume=task.resume and not options.without_resume)
    return Plan(name, task, tuple(options.cases), options.threads, (options.work / name).absolute() / "trials.jsonl")


def measure(case: str, number: int, name: str, task: Task, work: Path, options: argparse.Namespace,
            environment: Path | None, refused: dict[str, str]) -> Trial:
    """Run a case of a task once, print its measurements in one line, and return them."""
    trial = Trial(case, name, number, peer=case not in OUR_CASES, steps=task.steps, threads=options.threads)
    new, begun = options.making if case in CLASS_IMAGE_CASES else 0, time.monotonic()
    out = work / "out" / case.replace(" ", "_")
    if case in refused:
        trial = replace(trial, error=refused[case])
    else:
        trial = run_trial(options.trainers[case], environment, task, trial, work, 60 * options.timeout,
                          task.resume, new)
    if new and not trial.error:
        shutil.copytree(out, work / case, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("*.safetensors"))  # for class_quality.py
    shutil.rmtree(out, ignore_errors=True)  # the checkpoints of all trainers would fill the disk
    trial = replace(trial, seconds=round(time.monotonic() - begun, 1))
    print(f"{name}, round {number}, {case}: " + (trial.error or (
        f"{format_number(trial.images_per_second)} images/s, {format_number(trial.images_per_cpu)} per CPU s, "
        f"first step {format_number(trial.first_step_s)} s, peak {trial.peak_rss_gib:.2f} GiB, class images/s "
        f"{format_number(trial.class_images_per_second)}, resumed in {format_number(trial.resume_s)} s"
        f"{trial.note and f', {trial.note}'}; {trial.seconds:.0f} s")), flush=True)
    return trial


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # the process of a trainer ends, too
    main()
