"""diffusers' train_dreambooth.py against `python -m dreambooth.train`: the same model, photos and work.

    python benchmarks/speed.py --peer CHECKOUT/examples/dreambooth/train_dreambooth.py --write

Runs alternate, one process at a time, and each appends a line to WORK/trials.jsonl; the table is of all lines there.
Both trainers read the same folder of fp32 weights, the same photos and the same class images, with the same threads,
and train UNet and text encoder in fp32 with AdamW, batch n photos + n class images, clipping at 1, without EMA,
samples, evaluation, checkpoints or trackers. Speeds are medians over the steps after the first three.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from speed_table import CLASSES, SAME_GUIDANCE, Trial, machine, put, table, text, trials_of
from watched import watch

HERE = Path(__file__).parent
ROOT = HERE.parent
INSTANCE, CLASS = "a photo of a zwx toy", "a photo of a toy"
WARM = 3  # steps that no speed counts
Clock = Callable[[float], float]  # moment -> seconds: its own, or CPU seconds until then


def wall(moment: float) -> float:
    return moment


@dataclass(frozen=True)
class Size:
    """What is trained, and how long."""

    resolution: int
    batch: int  # photos, and as many class images
    steps: int
    class_images: int


SIZES = {"tiny": Size(64, 4, 40, 8), "full": Size(256, 1, 4, 2)}
OURS = {  # overrides beside the common ones
    "same work": ["memory.cache_latents=false"],
    "caches": [],
    "compiled": ["train.compile=true"],
    "channels last": ["train.channels_last=true"],
    "caches and EMA": ["train.use_ema=true"],
    SAME_GUIDANCE: ["prior.guidance_scale=7.5"],
}


def peer_command(script: Path, work: Path, size: Size, notes: Path, making: int) -> list[str]:
    """diffusers' script with our settings. `making`: class images to make, 0 to use those that are there."""
    folder = work / ("peer_class" if making else "class")
    return [
        sys.executable, str(HERE / "peer.py"), str(notes), str(script),
        f"--pretrained_model_name_or_path={work / 'base'}", f"--instance_data_dir={work / 'photos'}",
        f"--instance_prompt={INSTANCE}", f"--class_prompt={CLASS}", "--with_prior_preservation",
        "--prior_loss_weight=0.5", f"--class_data_dir={folder}",
        f"--num_class_images={making or size.class_images}", f"--sample_batch_size={size.batch}",
        f"--output_dir={work / 'peer'}", f"--resolution={size.resolution}", "--center_crop", "--train_text_encoder",
        f"--train_batch_size={size.batch}", f"--max_train_steps={1 if making else size.steps}",
        "--learning_rate=1e-5", "--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=0",
        "--checkpointing_steps=1000000"]


def our_command(work: Path, size: Size, more: list[str], making: int) -> list[str]:
    """Our door with the same settings."""
    given = [] if making else [f"dataset.class_dir={work / 'class'}"]
    return [
        sys.executable, "-m", "dreambooth.train", f"run_root={work / 'runs'}", "hardware=cpu", "tracking=none",
        f"model.source={work / 'base'}", f"model.resolution={size.resolution}", "dataset.allow_drawings=true",
        f"dataset.instance_dir={work / 'photos'}", f"dataset.instance_prompt={INSTANCE}",
        f"dataset.class_prompt={CLASS}", *given, f"prior.num_class_images={making or size.class_images}",
        "prior.prior_loss_weight=0.5", "train.train_text_encoder=true", f"train.train_batch_size={size.batch}",
        f"train.max_train_steps={1 if making else size.steps}", "train.learning_rate=1e-5", "sample.every=null",
        "checkpoint.every=null", "evaluate.encoder=none", "train.use_ema=false", *more]


def step_ends(path: Path) -> list[float]:
    """Times, seconds since 1970, at which steps ended: from the peer's notes or from our metrics.jsonl."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ours = [entry["time"] / 1000 for entry in entries if "loss" in entry.get("metrics", {})]
    return ours or [entry["time"] for entry in entries if entry.get("bar") == "Steps"]


def class_rate(folder: Path, clock: Clock = wall) -> float | None:
    """Images a second by the files' times, from the end of the first batch to the end of the last."""
    times = sorted(path.stat().st_mtime for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
    gap = 0.5 * max((later - sooner for sooner, later in pairwise(times)), default=0.0)
    first = next((number for number, (sooner, later) in enumerate(pairwise(times), 1) if later - sooner > gap), None)
    return None if first is None else (len(times) - first) / (clock(times[-1]) - clock(times[first - 1]))


def step_rate(ends: list[float], images: int, clock: Clock = wall) -> float | None:
    """Images a second, the median over the steps that count; a step begins where the last one ended."""
    steps = [clock(later) - clock(sooner) for sooner, later in pairwise(ends)]
    counted = steps[min(WARM, len(steps) // 2):]
    return images / median(counted) if counted else None


def trial(case: str, model: str, number: int, size: Size, peer: Path, work: Path, threads: int, making: int) -> Trial:
    """One process of `case` in round `number`."""
    notes, runs = work / "notes.jsonl", work / "runs"
    notes.unlink(missing_ok=True)
    for folder in (runs, work / "peer", work / "inductor", *([work / "peer_class"] if case in CLASSES else [])):
        shutil.rmtree(folder, ignore_errors=True)
    made = making if case in CLASSES else 0
    if case.startswith("peer"):
        command = peer_command(peer, work, size, notes, made)
    else:
        command = our_command(work, size, OURS.get(case, []), made)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT),
                                "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}  # empty: each run compiles anew
    seen = watch(command, ROOT, environment, work / f"{case.replace(' ', '_')}.log")
    ends = step_ends(notes if case.startswith("peer") else next(runs.glob("*/metrics.jsonl")))
    found = Trial(case, model, number, step_rate(ends, 2 * size.batch), step_rate(ends, 2 * size.batch, seen.cpu),
                  ends[0] - seen.began, seen.cpu(ends[0]), seen.peak_rss_gib, seen.cpu_seconds)
    if made:
        pictures = work / "peer_class" if case.startswith("peer") else runs / "class_images"
        found.class_images_per_second, found.class_images_per_cpu = class_rate(pictures), class_rate(pictures, seen.cpu)
        shutil.copytree(pictures, work / case, dirs_exist_ok=True)  # for class_quality.py
    return found


def prepare(model: str, work: Path, size: Size) -> None:
    """The folder of fp32 weights, photos and class images that both trainers read."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "dreambooth" / "assets" / "demo", work / "photos", dirs_exist_ok=True)
    for number, photo in enumerate(sorted((work / "photos").glob("*.png"))[:size.class_images]):
        (work / "class").mkdir(exist_ok=True)  # speed does not depend on what they show
        shutil.copy(photo, work / "class" / f"{number}.png")
    for number in range(len(list((work / "class").iterdir())), size.class_images):
        shutil.copy(work / "class" / "0.png", work / "class" / f"{number}.png")
    if not (work / "base").is_dir():
        subprocess.run([sys.executable, str(HERE / "make_base.py"), model, str(work / "base")], check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--peer", type=Path, required=True, help="diffusers' examples/dreambooth/train_dreambooth.py")
    ask.add_argument("--model", choices=SIZES, default="tiny")
    ask.add_argument("--cases", nargs="+", default=["peer", "same work", "caches"],
                     help=f"peer, {', '.join(OURS)}, {', '.join(sorted(CLASSES))}")
    ask.add_argument("--repeats", type=int, default=3, help="rounds; in each, every case once")
    ask.add_argument("--steps", type=int, help="training steps a process")
    ask.add_argument("--making", type=int, default=64, help="class images that a class image case makes")
    ask.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    ask.add_argument("--work", type=Path, default=ROOT / "outputs" / "speed", help="what both trainers read and write")
    ask.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = ask.parse_args()
    size = SIZES[given.model]
    size = Size(size.resolution, size.batch, given.steps or size.steps, size.class_images)
    work = (given.work / given.model).absolute()
    prepare(given.model, work, size)
    path = work / "trials.jsonl"
    begun = max((entry.round for entry in trials_of(path)), default=0)
    for number in range(begun + 1, begun + 1 + given.repeats):
        for case in given.cases:
            done = trial(case, given.model, number, size, given.peer.absolute(), work, given.threads, given.making)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(done)) + "\n")
            print(f"{case}: {text(done.images_per_second)} images/s, first step {text(done.first_step_s)} s, "
                  f"peak {done.peak_rss_gib:.2f} GiB, class images/s {text(done.class_images_per_second)}", flush=True)
    rows = [machine(given.threads), "", *table(trials_of(path))]
    print("\n".join(rows))
    if given.write:
        put(given.model, rows)


if __name__ == "__main__":
    main()
