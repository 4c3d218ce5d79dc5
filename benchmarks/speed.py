"""Compares the training speed of diffusers' train_dreambooth.py ("peer") and of our `python -m dreambooth.train`.

    python benchmarks/speed.py --peer CHECKOUT/examples/dreambooth/train_dreambooth.py --write

The trainers run alternately, one process at a time. Each process appends one line to WORK/trials.jsonl, and the table
summarises all lines of that file. Both trainers read the same folder of fp32 weights, the same photos and the same
class images, and use the same number of threads. They train UNet and text encoder in fp32 with AdamW, a batch of
n photos and n class images, and clipping at 1, without EMA, samples, evaluation, checkpoints or trackers. Speeds are
medians over the steps after the first three.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from process_monitor import run_monitored
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
from timings import class_rate, step_end_times, step_rate

HERE = Path(__file__).parent
ROOT = HERE.parent
INSTANCE, CLASS = "a photo of a zwx toy", "a photo of a toy"


@dataclass(frozen=True)
class Size:
    """The size of a training run."""

    resolution: int
    batch: int  # photos per batch; a batch contains as many class images
    steps: int
    class_images: int


SIZES = {"tiny": Size(64, 4, 40, 8), "full": Size(256, 1, 4, 2)}
OUR_CASES = {  # case -> overrides in addition to the common ones
    "same work": ["memory.cache_latents=false"],
    "caches": [],
    "compiled": ["train.compile=true"],
    "channels last": ["train.channels_last=true"],
    "caches and EMA": ["train.use_ema=true"],
    SAME_GUIDANCE: ["prior.guidance_scale=7.5"],
}


def peer_command(script: Path, work: Path, size: Size, log: Path, new_class_images: int) -> list[str]:
    """Return the command that runs diffusers' script with our settings.

    Args:
        log: where run_diffusers_script.py writes the times of the progress bars.
        new_class_images: class images to generate; 0: use those in the folder `class`.
    """
    folder = work / ("peer_class" if new_class_images else "class")
    return [
        sys.executable, str(HERE / "run_diffusers_script.py"), str(log), str(script),
        f"--pretrained_model_name_or_path={work / 'base'}", f"--instance_data_dir={work / 'photos'}",
        f"--instance_prompt={INSTANCE}", f"--class_prompt={CLASS}", "--with_prior_preservation",
        "--prior_loss_weight=0.5", f"--class_data_dir={folder}",
        f"--num_class_images={new_class_images or size.class_images}", f"--sample_batch_size={size.batch}",
        f"--output_dir={work / 'peer'}", f"--resolution={size.resolution}", "--center_crop", "--train_text_encoder",
        f"--train_batch_size={size.batch}", f"--max_train_steps={1 if new_class_images else size.steps}",
        "--learning_rate=1e-5", "--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=0",
        "--checkpointing_steps=1000000"]


def our_command(work: Path, size: Size, overrides: list[str], new_class_images: int) -> list[str]:
    """Return the command that runs `python -m dreambooth.train` with the same settings."""
    class_dir = [] if new_class_images else [f"dataset.class_dir={work / 'class'}"]
    return [
        sys.executable, "-m", "dreambooth.train", f"run_root={work / 'runs'}", "hardware=cpu", "tracking=none",
        f"model.source={work / 'base'}", f"model.resolution={size.resolution}", "dataset.allow_drawings=true",
        f"dataset.instance_dir={work / 'photos'}", f"dataset.instance_prompt={INSTANCE}",
        f"dataset.class_prompt={CLASS}", *class_dir, f"prior.num_class_images={new_class_images or size.class_images}",
        "prior.prior_loss_weight=0.5", "train.train_text_encoder=true", f"train.train_batch_size={size.batch}",
        f"train.max_train_steps={1 if new_class_images else size.steps}", "train.learning_rate=1e-5",
        "sample.every=null", "checkpoint.every=null", "evaluate.encoder=none", "train.use_ema=false", *overrides]


def run_trial(case: str, model: str, number: int, size: Size, peer: Path, work: Path, threads: int,
              new_class_images: int) -> Trial:
    """Run `case` in a new process in round `number`, and return its measurements."""
    log, runs = work / "notes.jsonl", work / "runs"
    log.unlink(missing_ok=True)
    for folder in (runs, work / "peer", work / "inductor",
                   *([work / "peer_class"] if case in CLASS_IMAGE_CASES else [])):
        shutil.rmtree(folder, ignore_errors=True)
    generated = new_class_images if case in CLASS_IMAGE_CASES else 0
    is_peer = case.startswith("peer")
    if is_peer:
        command = peer_command(peer, work, size, log, generated)
    else:
        command = our_command(work, size, OUR_CASES.get(case, []), generated)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT),
                                "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}  # an empty cache: every run compiles
    usage = run_monitored(command, ROOT, environment, work / f"{case.replace(' ', '_')}.log")
    clock = usage.cpu_seconds_until
    end_times = step_end_times(log if is_peer else next(runs.glob("*/metrics.jsonl")))
    trial = Trial(case, model, number, step_rate(end_times, 2 * size.batch),
                  step_rate(end_times, 2 * size.batch, clock), end_times[0] - usage.started, clock(end_times[0]),
                  usage.peak_rss_gib, usage.cpu_seconds)
    if generated:
        images = work / "peer_class" if is_peer else runs / "class_images"
        trial.class_images_per_second, trial.class_images_per_cpu = class_rate(images), class_rate(images, clock)
        shutil.copytree(images, work / case, dirs_exist_ok=True)  # for class_quality.py
    return trial


def prepare(model: str, work: Path, size: Size) -> None:
    """Create the fp32 weights, photos and class images that both trainers read."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "dreambooth" / "assets" / "demo", work / "photos", dirs_exist_ok=True)
    for number, photo in enumerate(sorted((work / "photos").glob("*.png"))[:size.class_images]):
        (work / "class").mkdir(exist_ok=True)  # their content has no effect on the speed
        shutil.copy(photo, work / "class" / f"{number}.png")
    for number in range(len(list((work / "class").iterdir())), size.class_images):
        shutil.copy(work / "class" / "0.png", work / "class" / f"{number}.png")
    if not (work / "base").is_dir():
        subprocess.run([sys.executable, str(HERE / "make_base.py"), model, str(work / "base")], check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="diffusers' examples/dreambooth/train_dreambooth.py")
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--cases", nargs="+", default=["peer", "same work", "caches"],
                        help=f"peer, {', '.join(OUR_CASES)}, {', '.join(sorted(CLASS_IMAGE_CASES))}")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs every case once")
    parser.add_argument("--steps", type=int, help="training steps per process")
    parser.add_argument("--making", type=int, default=64, help="class images that a class image case generates")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "speed",
                        help="folder that both trainers read and write")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    options = parser.parse_args()
    size = SIZES[options.model]
    size = Size(size.resolution, size.batch, options.steps or size.steps, size.class_images)
    work = (options.work / options.model).absolute()
    prepare(options.model, work, size)
    path = work / "trials.jsonl"
    last_round = max((trial.round for trial in read_trials(path)), default=0)
    for number in range(last_round + 1, last_round + 1 + options.repeats):
        for case in options.cases:
            trial = run_trial(case, options.model, number, size, options.peer.absolute(), work, options.threads,
                              options.making)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
            print(f"{case}: {format_number(trial.images_per_second)} images/s, "
                  f"first step {format_number(trial.first_step_s)} s, peak {trial.peak_rss_gib:.2f} GiB, "
                  f"class images/s {format_number(trial.class_images_per_second)}", flush=True)
    rows = [describe_machine(options.threads), "", *format_table(read_trials(path))]
    print("\n".join(rows))
    if options.write:
        write_section(options.model, rows)


if __name__ == "__main__":
    main()
