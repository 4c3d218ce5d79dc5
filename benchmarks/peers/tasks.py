"""What is trained, and the interface of an adapter that trains it with one trainer."""

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

INSTANCE, CLASS = "a photo of a zwx toy", "a photo of a toy"
LEARNING_RATE, RANK, PRIOR_WEIGHT = 1e-5, 16, 0.5
LAUNCHER = Path(__file__).parent / "launcher.py"


@dataclass(frozen=True)
class Task:
    """A training run that each trainer performs. All tasks train with AdamW in fp32 and clip at 1.

    Attributes:
        base: name of the base model, see make_base.py.
        family: sd, sdxl or z_image.
        lora: True: a LoRA of rank RANK in the denoiser; False: all weights of UNet and text encoder.
        batch: photos per batch; a batch contains as many class images, if the task has some.
        class_images: number of class images in the folder `class`, which all trainers read; 0: training without
            prior preservation.
        rounds: how often each case is measured.
        seconds: rough duration of one process on a quiet machine with 2 cores, for the estimate before the first run.
        resume: whether a checkpoint, and resuming from it, are measured.
    """

    base: str
    family: str
    lora: bool
    resolution: int
    batch: int
    steps: int
    class_images: int
    rounds: int
    seconds: float
    resume: bool = True

    @property
    def images(self) -> int:
        """Images per batch."""
        return self.batch * (2 if self.class_images else 1)


TASKS = {
    "tiny": Task("tiny", "sd", False, 64, 4, 30, 8, 2, 20),
    "tiny_lora": Task("tiny", "sd", True, 64, 4, 30, 8, 2, 20),
    "full": Task("full", "sd", False, 256, 1, 8, 2, 2, 170, resume=False),
    "full_lora": Task("full", "sd", True, 256, 1, 8, 2, 2, 75),
    "sdxl_lora": Task("tiny_sdxl", "sdxl", True, 64, 4, 30, 8, 2, 20),
    "flow_lora": Task("tiny_flow", "z_image", True, 64, 4, 30, 0, 2, 20),
}


@dataclass(frozen=True)
class Job:
    """One process of a trainer.

    Attributes:
        work: folder of the task, with its photos and class images.
        out: folder of this process. It is empty unless `resume` is true.
        log: where launcher.py writes the times of the progress bars.
        steps: steps of the whole run.
        save_at: step after which a checkpoint is written; None: no checkpoint during training.
        resume: whether the run continues from the checkpoint in `out`.
        new_class_images: class images to generate before one step; 0: those in the folder `class` are used.
    """

    task: Task
    work: Path
    out: Path
    log: Path
    steps: int
    save_at: int | None = None
    resume: bool = False
    new_class_images: int = 0

    @property
    def base(self) -> Path:
        return base_folder(self.task, self.work)

    def with_steps(self, steps: int, save_at: int | None, resume: bool) -> "Job":
        return replace(self, steps=steps, save_at=save_at, resume=resume)


@dataclass(frozen=True)
class Call:
    """How a process is started.

    Attributes:
        command: the arguments that follow the interpreter.
        settings: number of settings that a user writes: options of the command, overrides, or lines of a file.
        folder: working directory.
    """

    command: list[str]
    settings: int
    folder: Path
    environment: Mapping[str, str]


class Trainer(ABC):
    """A trainer that is measured.

    Attributes:
        name: the case in the tables.
        packages: what its environment contains in addition to the packages of this project.
        python: the oldest version of Python that it supports.
        interpreter: the Python of its environment, which then shares no packages with this project; None: that of this
            process.
    """

    name: str
    packages: tuple[str, ...] = ()
    python: tuple[int, int] = (3, 11)
    interpreter: Path | None = None

    @abstractmethod
    def call(self, job: Job) -> Call:
        """Write the files that the process reads, and return how it is started.

        Raises:
            NotSupported: the trainer has no command for this task.
        """

    @abstractmethod
    def checkpoint(self, out: Path) -> Path | None:
        """Return the newest checkpoint (a file or a folder) from which the trainer resumes; None: there is none."""

    def step_log(self, job: Job) -> Path:
        """Return the file with the times of the steps."""
        return job.log


class NotSupported(Exception):
    """The trainer has no command for a task, or cannot be installed; the message says why."""


def launched(job: Job, script: Path, options: list[str], settings: int | None = None, folder: Path | None = None,
             paths: tuple[Path, ...] = (), **environment: str) -> Call:
    """Return the call of a peer's script by launcher.py.

    Args:
        settings: as in Call; None: the number of options.
        paths: folders that the script imports from, in addition to its own.
    """
    count = sum(option.startswith("-") for option in options) if settings is None else settings
    own = {"PYTHONPATH": ":".join(map(str, paths)), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return Call([str(LAUNCHER), str(job.log), str(script), *options], count, folder or job.out, own | environment)


def base_folder(task: Task, work: Path) -> Path:
    """Return the folder of a task's base model. Tasks with the same base share it."""
    return work.parent / "bases" / task.base


def newest(folder: Path, pattern: str) -> Path | None:
    """Return the path below `folder` that matches `pattern` and was changed last."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def write_json(path: Path, content: Any) -> int:
    """Write a configuration file with one setting per line, and return the number of its settings."""
    text = json.dumps(content, indent=2)
    path.write_text(text, "utf-8")
    return sum('":' in line and not line.rstrip().endswith(("{", "[")) for line in text.splitlines())


def repeats(job: Job, photos: int) -> int:
    """Return how often photos are repeated so that an epoch has the steps of a job, up to its checkpoint if it resumes.

    Args:
        photos: number of photos.
    """
    steps = job.save_at if job.resume and job.save_at else job.steps
    return math.ceil(steps * job.task.batch / photos)


def interpreter(environment: Path | None) -> str:
    """Return the Python of an environment; None: that of this process."""
    return sys.executable if environment is None else str(environment / "bin" / "python")
