"""One trial of `make torture`: a short training run that is disturbed, and then repeated without the disturbance."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import faults
from tests.support.runs import assert_same, the_run
from tests.support.warm_python import PYTHON

# Settings of the reference run of each profile, in addition to faults.FAST.
PROFILES: dict[str, tuple[str, ...]] = {
    "short": (),
    "one prompt": ("sample.prompts=[a photo of a zwx toy]",),
    "extended": ("sample.prompts=[a photo of a zwx toy]", "train.max_train_steps=10"),
    "with evaluation": ("evaluate.encoder=efficientnet_lite0", "evaluate.images_per_prompt=1",
                        "evaluate.class_images=2"),
}


class TortureError(Exception):
    """The outcome of a trial is neither an equal run nor a clear sentence."""


@dataclass(frozen=True)
class Trial:
    """A disturbed run.

    Attributes:
        kind: the group of the trial in the report, such as `kill -9`.
        name: the moment or the cause of the disturbance.
        function: performs the trial; receives a Place and `arguments`, and returns the outcome as a short phrase.
        profile: key of PROFILES.
        needs_root: whether the trial mounts disks or creates users.
    """

    kind: str
    name: str
    function: Callable[..., str]
    arguments: tuple[Any, ...] = ()
    profile: str = "short"
    needs_root: bool = False


@dataclass(frozen=True)
class Place:
    """An empty folder for the runs of one trial, and the reference run to compare them with."""

    folder: Path
    reference: Path
    settings: tuple[str, ...]

    @property
    def log(self) -> Path:
        """The output of all commands of the trial."""
        return self.folder.with_suffix(".log")

    @property
    def run_dir(self) -> Path:
        """The run folder of the trial."""
        return the_run(self.folder)

    def train(self, *overrides: str, fault: str | None = None, seed: int = 0) -> int:
        """Run the training command under a fault of tests/support/faults.py. Return its exit code, -9 if it was killed.

        Raises:
            TortureError: the output contains a traceback, or the command failed without a message.
        """
        start = len(self.output())
        code = faults.train(self.folder, *self.settings, *overrides, fault=fault, seed=seed, log=self.log)
        self.check_output(code, start)
        return code

    def start(self, *overrides: str) -> "subprocess.Popen[bytes]":
        """Start the training command, and return its process without waiting."""
        words = [PYTHON, "-m", "dreambooth.train", f"run_root={self.folder}", *faults.FAST, *self.settings, *overrides]
        with self.log.open("ab") as file:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=faults.ROOT)

    def repeat(self, *overrides: str, except_for: str = "") -> str:
        """Run the training command undisturbed, and compare the run with the reference. Return "equal".

        Args:
            except_for: what is not compared: losses, samples, or nothing if empty.

        Raises:
            TortureError: the command failed, or the run differs.
        """
        if code := self.train(*overrides):
            raise TortureError(f"the repeated command ended with exit code {code}: {self.sentence()}")
        try:
            assert_same(self.run_dir, self.reference, except_for)
        except Exception as error:
            raise TortureError(f"the repeated run differs from an undisturbed one: {error}") from error
        return "equal"

    def outcome(self, code: int) -> str:
        """The exit code, with the sentence that explains it unless it is 0."""
        return f"exit code {code}" + (f": {self.sentence()}" if code else "")

    def sentence(self) -> str:
        """The last line of the output, usually an error message."""
        return (self.output().strip().splitlines() or ["no output"])[-1]

    def check_output(self, code: int, start: int = 0) -> None:
        """Check the output after character `start`.

        Raises:
            TortureError: it contains a traceback, or is empty although the exit code is positive.
        """
        output = self.output()[start:]
        if "Traceback" in output or (code > 0 and not output.strip()):
            raise TortureError(f"exit code {code} without a clear message: {self.sentence()}")

    def output(self) -> str:
        """The output of all commands so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def perform(trial: Trial, parent: Path, reference: Path) -> str:
    """Perform a trial in a new folder below `parent`. The folder is removed if the trial succeeds.

    Returns:
        The outcome as a short phrase. If the trial failed, it begins with FAILED.
    """
    place = Place(Path(tempfile.mkdtemp(prefix="trial-", dir=parent)), reference, PROFILES[trial.profile])
    succeeded = False
    try:
        outcome, succeeded = trial.function(place, *trial.arguments), True
    except TortureError as error:
        outcome = f"FAILED: {error}; see {place.log}"
    except Exception as error:  # a bug of the trial itself
        outcome = f"FAILED: {type(error).__name__} {error}; see {place.log}"
    if succeeded:
        shutil.rmtree(place.folder, ignore_errors=True)
        place.log.unlink(missing_ok=True)
    print(f"{trial.kind}: {trial.name}: {outcome}", flush=True, file=sys.stdout if succeeded else sys.stderr)
    return outcome


def reference_run(folder: Path, profile: str) -> Path:
    """Train the undisturbed run of a profile below `folder`. Return its run folder.

    Raises:
        SystemExit: the run failed.
    """
    log = folder.with_suffix(".log")
    if code := faults.train(folder, *PROFILES[profile], log=log):
        raise SystemExit(f"The undisturbed run ended with exit code {code}: see {log}")
    return the_run(folder)
