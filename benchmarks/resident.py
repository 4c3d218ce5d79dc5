"""The planner against a real step: SD 1.5 with random weights on the CPU. python benchmarks/resident.py [PIXELS]

Compares the growth of the process's resident memory over its weights, while a real forward and backward pass of the
training step run, with what the rehearsal on fake tensors predicts. Takes about 8 GB and a few minutes.
"""

import os
import sys
import threading
import time
from pathlib import Path

import psutil

from dreambooth.config.enums import Dtype
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.config.schema import Config
from dreambooth.models import loading
from dreambooth.planner import rehearsal
from dreambooth.planner.allocation_trace import MARK
from dreambooth.planner.prediction import STEP, Prediction
from dreambooth.utils.hardware import GIB

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc gives freed blocks back


def recipe(pixels: int) -> Recipe:
    """fp32, checkpointing, one photo, no prior, no EMA, latents and text cached."""
    config = Config()
    config.model.name, config.model.source, config.model.resolution = "sd15", "runwayml/stable-diffusion-v1-5", pixels
    config.dataset.instance_dir, config.dataset.instance_prompt = "photos", "a photo of a zwx dog"
    config.prior.with_prior_preservation, config.train.use_ema, config.sample.every = False, False, None
    config.precision.dtype, config.memory.gradient_checkpointing = Dtype.fp32, True
    return resolve(config, Path("runs/plan"))


def predicted(found: Prediction) -> float:
    """GiB of gradients, activations and temporaries at the fullest moment of a step."""
    now = most = 0
    phase = ""
    for serial, size in found.trace.events:
        if serial == MARK:
            phase = found.trace.marks[size]
        elif found.trace.category[serial] in ("gradients", "activations", "temporaries"):
            now += size
            most = max(most, now) if phase in STEP else most
    return most / GIB


def measured(asked: Recipe) -> float:
    """GiB that the process grows by during the step. The modelled optimizer's state is never touched."""
    process, seen, done, start = psutil.Process(), [0], threading.Event(), [0]
    equip = rehearsal.equip

    def equipped(*args: object) -> object:
        start[0] = process.memory_info().rss  # VAE and text encoder are gone, the step is not there
        seen[0] = 0
        return equip(*args)  # type: ignore[arg-type]

    def watch() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], process.memory_info().rss)
            time.sleep(0.005)

    rehearsal.equip = equipped  # type: ignore[assignment]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        rehearsal.rehearse(asked)
    finally:
        done.set()
        watcher.join()
    return (seen[0] - start[0]) / GIB


if __name__ == "__main__":
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    loading.import_libraries()
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    expected, seen = predicted(rehearsal.predict(recipe(side))), measured(recipe(side))
    print(f"SD 1.5, {side} px, fp32, checkpointing: predicted {expected:.2f} GiB over the weights, "
          f"resident memory grew by {seen:.2f} ({expected / seen - 1:+.1%})")
