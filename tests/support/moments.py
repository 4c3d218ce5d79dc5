"""Starts a run and sends it a signal at a named moment: `stop_at(run_root, "samples")`.

The signal comes DELAY seconds after a function was called, so that it finds the run in the middle of the function's
work. faults.py starts the process and installs the moment, as it installs faults.
"""

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DELAY = 0.03  # seconds between the call of the function and the signal
REPORT = "DREAMBOOTH_MOMENT_REPORT"  # environment variable: the file for the time at which the signal was sent
NUMBER = "DREAMBOOTH_MOMENT_SIGNAL"  # environment variable: the number of the signal

# Name of the moment -> the function as module:path, and which of its calls, counted from 0 in the process. In order of
# a run with the settings faults.FAST.
MOMENTS: dict[str, tuple[str, int]] = {
    "libraries": ("dreambooth.models.loading:import_libraries", 0),
    "photos": ("dreambooth.data.subjects:load_subject_photos", 0),
    "model": ("dreambooth.models.loading:load", 0),
    "first_class_image": ("dreambooth.training.setup:generate_images", 0),
    "second_class_image": ("dreambooth.training.setup:generate_images", 1),
    "latents": ("dreambooth.data.batches:Latents.fill", 0),
    "optimizer": ("dreambooth.models.loading:prepare", 0),
    "tracker": ("dreambooth.run:track_run", 0),
    "first_samples": ("dreambooth.training.sample_images:generate_images", 0),
    "first_step": ("dreambooth.run:train_step", 0),
    "first_checkpoint": ("dreambooth.training.checkpoint:save", 0),
    "step": ("dreambooth.run:train_step", 2),
    "checkpoint_file": ("dreambooth.training.checkpoint:save_file", 4),
    "samples": ("dreambooth.training.sample_images:generate_images", 1),
    "contact_sheet": ("dreambooth.training.sample_images:contact_sheet", 1),
    "last_samples": ("dreambooth.training.sample_images:generate_images", 2),
    "evaluation": ("dreambooth.evaluation.evaluator:generate_images", 0),
    "scores": ("dreambooth.evaluation.evaluator:score", 0),
    "instance_loss": ("dreambooth.run:instance_loss", 0),
    "export": ("dreambooth.serialization.export:export", 0),
    "result": ("dreambooth.runs.run_folder:Result.write", 0),
}


class Stopped(NamedTuple):
    """How a run ended after the signal."""

    code: int
    seconds: float  # from the signal to the end of the process


def stop_at(run_root: Path, moment: str, *overrides: str, number: int = signal.SIGTERM,
            log: Path | None = None) -> Stopped:
    """Run `train` with the settings faults.FAST and send it a signal at a moment."""
    from tests.support.faults import train

    report = run_root / f"signal-{moment}"
    report.unlink(missing_ok=True)
    os.environ |= {REPORT: str(report), NUMBER: str(int(number))}
    try:
        code = train(run_root, *overrides, fault=f"signal_at_{moment}", log=log)
    finally:
        del os.environ[REPORT], os.environ[NUMBER]
    assert report.is_file(), f"the run ended before the moment {moment}, with exit code {code}"
    return Stopped(code, time.monotonic() - float(report.read_text()))  # the clock is the same in all processes


def install(moment: str) -> None:
    """Inside the process of the run: replace the moment's function by one that also starts a timer for the signal."""
    target, number = MOMENTS[moment]
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), iter(range(10**9))

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            threading.Timer(DELAY, _send).start()
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def _send() -> None:
    Path(os.environ[REPORT]).write_text(str(time.monotonic()))
    os.kill(os.getpid(), int(os.environ[NUMBER]))


# What faults.py calls to install each moment; the seed is not used.
FAULTS: dict[str, Callable[[int], None]] = {
    f"signal_at_{name}": lambda seed, name=name: install(name) for name in MOMENTS}
