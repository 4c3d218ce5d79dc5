"""What a run makes, copied to S3 while it runs and after."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreambooth.config.schema import Storage
from dreambooth.errors import DreamBoothError, UserError
from dreambooth.runs.checkpoint_files import intact, latest
from dreambooth.storage import folders
from dreambooth.storage.manifest import Entries, of_folder
from dreambooth.storage.run_inputs import first
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console

MADE = (".hydra", "model", "samples", "contact_sheet.png", "evaluation.json", "metrics.jsonl", "result.json",
        "run.json")
LOOK = 5.0  # seconds between two looks for a new checkpoint
LONGEST = 600.0  # seconds until one that could not be copied is tried again
log = logging.getLogger(__name__)


@contextmanager
def kept(spec: Storage, run_dir: Path, resume: str) -> Iterator[Callable[[Any], None]]:
    """Copy to `storage.upload` what a run makes: checkpoints as they come, and what the yielded function is told of.

    Raises:
        UserError: the result could not be copied. A checkpoint that could not be is a warning: the run goes on.
    """
    if spec.upload is None or not first():
        yield lambda result: None
        return
    place = f"{spec.upload.rstrip('/')}/{run_dir.name}"
    mirror = Mirror(run_dir, place, spec.parallel) if spec.checkpoints else None
    if mirror:
        mirror.bring(resume)
        mirror.start()
    try:
        yield lambda result: _copy(result.step, run_dir, place, spec.parallel)
    finally:
        if mirror:
            mirror.finish()


def _copy(step: int, run_dir: Path, place: str, parallel: int) -> None:
    """The result, into a folder named by its steps: a run that is extended makes another."""
    console, target = Console(), f"{place}/result-{step:06d}"
    target = folders.upload_beside(run_dir, target, of_folder(run_dir, MADE), console, parallel, core="model/")
    console.say(f"complete in {target}")


class Mirror(threading.Thread):
    """Copies each new checkpoint, newest first; one that is rotated away meanwhile is passed over, as is a damaged one.

    One that cannot be copied is tried again ever more seldom, since each attempt competes with the training.
    """

    def __init__(self, run_dir: Path, place: str, parallel: int) -> None:
        super().__init__(name="checkpoints to S3", daemon=True)
        self._folder, self._place, self._parallel = run_dir / "checkpoints", f"{place}/checkpoints", parallel
        self._done: set[str] = set()
        self._failed, self._pause, self._again = "", LOOK, 0.0  # the last that could not be copied; when to try again
        self._read: tuple[Any, Entries] = None, {}  # the last checkpoint that was read, and what it holds
        self._closing = threading.Event()

    def bring(self, resume: str) -> None:
        """Put the newest checkpoint of S3 where the run will look, if this machine has none that is whole."""
        there = folders.complete_folders(self._place)
        if there and resume != "auto":
            raise UserError(f"{self._place} holds checkpoints of this run: type checkpoint.resume=auto, or another "
                            "storage.upload")
        names = [folders.first_of(uri.rpartition("/")[2]) for uri in there]
        if there and latest(self._folder) is None:
            aside = self._folder / f"{atomic_files.ASIDE}s3"
            folder = folders.download(there[-1], aside, Console(), self._parallel, complete=True)
            if (self._folder / names[-1]).exists():
                atomic_files.remove_folder(self._folder / names[-1])
            atomic_files.publish(folder, self._folder / names[-1])
        self._done = set(names)

    def run(self) -> None:
        while not self._closing.wait(LOOK):
            self._turn()

    def finish(self) -> None:
        """Copy the last one too."""
        self._closing.set()
        self.join()
        self._again = 0.0
        self._turn()

    def _turn(self) -> None:
        new = [path for path in self._folder.glob("step-*")
               if path.name not in self._done and intact(path)]
        for path in sorted(new, key=atomic_files.number_of)[-1:]:
            if path.name == self._failed and time.monotonic() < self._again:
                continue
            try:
                folders.upload_beside(path, f"{self._place}/{path.name}", self._entries(path), None, self._parallel)
                self._done.add(path.name)
            except FileNotFoundError:
                pass
            except DreamBoothError as error:
                if path.is_dir():
                    self._put_off(path.name, error)

    def _entries(self, path: Path) -> Entries:
        """What a checkpoint holds, read once, not at each attempt."""
        key = path, path.stat().st_mtime_ns
        if self._read[0] != key:
            self._read = key, of_folder(path)
        return self._read[1]

    def _put_off(self, name: str, error: DreamBoothError) -> None:
        if name != self._failed:
            log.warning("checkpoint %s is not in S3: %s", name, error)
            self._failed, self._pause = name, LOOK
        self._pause = min(2 * self._pause, LONGEST)
        self._again = time.monotonic() + self._pause
