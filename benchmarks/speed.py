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
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from peers.environments import make_environment
from peers.hf_scripts import DiffusersScripts
from peers.kohya import Kohya
from peers.one_trainer import OneTrainer
from peers.ours import Ours
from peers.simple_tuner import SimpleTuner
from peers.tasks import TASKS, NotSupported, Task, Trainer
from peers.trials import run_trial
from speed_table import (
    CLASS_IMAGE_CASES,
    SAME_GUIDANCE,
    Trial,
    describe_machine,
    format_number,
    format_table,
    read_trials,
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
        scripts = [DiffusersScripts(options.diffusers.absolute()) for _ in range(2)]
        scripts[1].name = "diffusers class images"
        found += scripts
    if options.kohya:
        found.append(Kohya(options.kohya.absolute()))
    if options.onetrainer and options.mgds:
        found.append(OneTrainer(options.onetrainer.absolute(), options.mgds.absolute()))
    if options.simpletuner:
        found.append(SimpleTuner(options.simpletuner.absolute()))
    found += [Ours(name, *overrides) for name, overrides in OUR_CASES.items()]
    return {trainer.name: trainer for trainer in found}


def prepare(task: Task, work: Path) -> None:
    """Create the fp32 weights, photos and class images that all trainers read."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "dreambooth" / "assets" / "demo", work / "photos", dirs_exist_ok=True,
                    ignore=lambda _, names: [name for name in names if not name.endswith(".png")])
    photos = sorted((work / "photos").glob("*.png"))
    (work / "class").mkdir(exist_ok=True)
    for number in range(task.class_images):  # their content has no effect on the speed
        shutil.copy(photos[number % len(photos)], work / "class" / f"{number}.png")
    if not (work / "base").is_dir():
        subprocess.run([sys.executable, str(HERE / "make_base.py"), task.base, str(work / "base")], check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, title in (("diffusers", "huggingface/diffusers"), ("kohya", "kohya-ss/sd-scripts"),
                        ("onetrainer", "Nerogar/OneTrainer"), ("mgds", "Nerogar/mgds, which OneTrainer needs"),
                        ("simpletuner", "bghira/SimpleTuner")):
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT", help=title)
    parser.add_argument("--model", nargs="+", choices=TASKS, default=list(TASKS), help="tasks; default: all")
    parser.add_argument("--cases", nargs="+", help="names of peers, and of our cases: " + ", ".join(OUR_CASES)
                        + f"; default: all peers, {', '.join(DEFAULT_CASES)}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs every case once")
    parser.add_argument("--steps", type=int, help="training steps per process")
    parser.add_argument("--making", type=int, default=64, help="class images that a class image case generates")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without-resume", action="store_true", help="do not measure checkpoints and resuming")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "speed",
                        help="folder that all trainers read and write")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/benchmarks.md")
    options = parser.parse_args()
    trainers = find_trainers(options)
    default = [name for name in trainers if name not in OUR_CASES and name not in CLASS_IMAGE_CASES]
    cases = options.cases or [*default, *DEFAULT_CASES]
    if unknown := set(cases) - trainers.keys():
        parser.error(f"no trainer for {', '.join(sorted(unknown))}: name its checkout")
    environments: dict[str, Path | None] = {}
    refused: dict[str, str] = {}
    for name in cases:
        try:
            own = name in OUR_CASES
            environments[name] = None if own else make_environment(
                trainers[name], options.work.absolute() / "environments")
        except NotSupported as error:
            refused[name] = str(error)
    for model in options.model:
        task = replace(TASKS[model], steps=options.steps or TASKS[model].steps)
        work = (options.work / model).absolute()
        prepare(task, work)
        path = work / "trials.jsonl"
        first = 1 + max((trial.round for trial in read_trials(path)), default=0)
        for number in range(first, first + options.repeats):
            for case in cases:
                new = options.making if case in CLASS_IMAGE_CASES else 0
                trial = Trial(case, model, number, error=refused[case]) if case in refused else run_trial(
                    trainers[case], environments[case], task, model, number, work, options.threads,
                    number == first and not options.without_resume, new)
                if new and not trial.error:
                    shutil.copytree(work / "out" / case.replace(" ", "_"), work / case, dirs_exist_ok=True,
                                    ignore=shutil.ignore_patterns("*.safetensors"))  # for class_quality.py
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(trial)) + "\n")
                print(f"{model}, {case}: " + (trial.error or (
                    f"{format_number(trial.images_per_second)} images/s, first step "
                    f"{format_number(trial.first_step_s)} s, peak {trial.peak_rss_gib:.2f} GiB, class images/s "
                    f"{format_number(trial.class_images_per_second)}, resumed in {format_number(trial.resume_s)} s")),
                    flush=True)
        rows = [describe_machine(options.threads), "", *format_table(read_trials(path))]
        print("\n".join(rows))
        if options.write:
            write_section(model, rows)


if __name__ == "__main__":
    main()
