"""Compares the planner's prediction with a real step on the CPU: python benchmarks/resident_memory.py [PIXELS]

The model is SD 1.5 with random weights. The benchmark measures by how much the resident memory of the process grows
during a real training step, and compares this growth with the prediction of a rehearsal on fake tensors. It needs about
8 GB of memory and a few minutes.
"""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from dreambooth.config.enums import Dtype
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.config.schema import Config
from dreambooth.models import loading
from dreambooth.planner import rehearsal
from dreambooth.planner.allocation_trace import MARK
from dreambooth.planner.prediction import STEP_PHASES, Prediction
from dreambooth.utils.hardware import GIB

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # make glibc return freed blocks


def make_recipe(pixels: int) -> Recipe:
    """Build a recipe: fp32, checkpointing, batch size 1, no prior preservation, no EMA, cached latents and text."""
    config = Config()
    config.model.name, config.model.source, config.model.resolution = "sd15", "runwayml/stable-diffusion-v1-5", pixels
    config.dataset.instance_dir, config.dataset.instance_prompt = "photos", "a photo of a zwx dog"
    config.prior.with_prior_preservation, config.train.use_ema, config.sample.every = False, False, None
    config.precision.dtype, config.memory.gradient_checkpointing = Dtype.fp32, True
    return resolve(config, Path("runs/plan"))


def predicted_gib(prediction: Prediction) -> float:
    """Return the predicted peak GiB of gradients, activations and temporaries in a step."""
    live = peak = 0
    phase = ""
    for serial, size in prediction.trace.events:
        if serial == MARK:
            phase = prediction.trace.marks[size]
        elif prediction.trace.category[serial] in ("gradients", "activations", "temporaries"):
            live += size
            peak = max(peak, live) if phase in STEP_PHASES else peak
    return peak / GIB


def measured_gib(recipe: Recipe) -> float:
    """Run a real step, and return the GiB by which the process grows.

    The state of the modelled optimizer is allocated but never written to, so it does not become resident.
    """
    process, done = psutil.Process(), threading.Event()
    start = peak = 0
    build_training_optimizer = rehearsal.build_training_optimizer

    def measure_start(*args: Any) -> Any:
        """Record the memory right before the step: the rehearsal releases VAE and text encoder before this call."""
        nonlocal start, peak
        start, peak = process.memory_info().rss, 0
        return build_training_optimizer(*args)

    def record_peak() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.005)

    rehearsal.build_training_optimizer = measure_start
    recorder = threading.Thread(target=record_peak)
    recorder.start()
    try:
        rehearsal.rehearse(recipe)
    finally:
        done.set()
        recorder.join()
    return (peak - start) / GIB


if __name__ == "__main__":
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    loading.import_libraries()
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    predicted, measured = predicted_gib(rehearsal.predict(make_recipe(side))), measured_gib(make_recipe(side))
    print(f"SD 1.5, {side} px, fp32, checkpointing: predicted {predicted:.2f} GiB in addition to the weights, "
          f"resident memory grew by {measured:.2f} ({predicted / measured - 1:+.1%})")
