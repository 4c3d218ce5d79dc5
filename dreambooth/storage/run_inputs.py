"""s3:// in a run: what it reads is fetched before, what it makes is copied there while it runs and after.

A run folder is named by the text s3://..., so `remote.json` in it remembers which content that was.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from dreambooth.config.dataset import FOLDERS
from dreambooth.config.schema import Config, Storage
from dreambooth.config.storage import is_remote, is_single
from dreambooth.errors import DreamBoothError, UserError
from dreambooth.storage.manifest import Entries, of_folder
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console

READ = {("model", "source"): True, ("model", "vae"): False,
        ("checkpoint", "resume"): True, ("evaluate", "reference_dir"): False, ("evaluate", "prompts"): False,
        ("evaluate", "lpips"): False}  # key -> whether it must have a manifest
MADE = (".hydra", "model", "samples", "contact_sheet.png", "evaluation.json", "metrics.jsonl", "result.json",
        "run.json")
RECORD = "remote.json"
LOOK = 5.0  # seconds between two looks for a new checkpoint
LONGEST = 600.0  # seconds until one that could not be copied is tried again
log = logging.getLogger(__name__)


def first() -> bool:
    """Whether this is the first of the processes that train together."""
    return os.environ.get("RANK", "0") == "0"


def local(path: str | None, cache: str = "runs/s3") -> str | None:
    """The path itself, or the local copy of a complete folder in S3."""
    if not is_remote(path):
        return path
    from dreambooth.storage import folders

    return str(folders.download(str(path), Path(cache), Console(quiet=not first()), complete=not is_single(path)))


def wanted(config: Config) -> list[tuple[str, Any, str, bool]]:
    """What a run may read from S3: where the key is typed, what holds it, the key, whether it must have a manifest."""
    found: list[tuple[str, Any, str, bool]] = [
        (place, subject, key, False) for place, subject in config.dataset.places for key in FOLDERS]
    return found + [(section, getattr(config, section), key, complete) for (section, key), complete in READ.items()]


def fetched(config: Config, run_dir: Path | None) -> Config:
    """The config with local folders for everything that it reads from s3://.

    Args:
        run_dir: where to remember what that was; None: nowhere.

    Raises:
        UserError: it cannot be had, or is not what this run folder began with.
    """
    config = deepcopy(config)
    found: dict[str, str] = {}
    for section, part, key, complete in wanted(config):
        if is_remote(getattr(part, key)):
            from dreambooth.storage import folders

            folder = folders.download(getattr(part, key), Path(config.storage.cache).absolute(),
                                      Console(quiet=not first()), config.storage.parallel,
                                      complete=complete and not is_single(getattr(part, key)))
            named = folder.parent if section == "model" and folder.is_file() else folder  # by its content
            found[f"{section}.{key}={getattr(part, key)}"] = named.name
            setattr(part, key, str(model_in(folder) if section == "model" else folder))
    if found and run_dir:
        _remember(found, run_dir, config.checkpoint.resume)
    return config


def model_in(folder: Path) -> Path:
    """The model in a run's result, or the folder itself."""
    inner = folder / "model"
    return inner if inner.is_dir() else folder


def _remember(found: dict[str, str], run_dir: Path, resume: str) -> None:
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
    for what, content in found.items():
        if resume == "auto" and known.get(what, content) != content:
            raise UserError(f"{what} holds something else than when {run_dir.name} began: type checkpoint.resume=never "
                            "to start over, or name=NAME for a run of its own")
    if first() and run_dir.is_dir():
        atomic_files.write_json(run_dir / RECORD, found)


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
    from dreambooth.storage import folders

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
        from dreambooth.storage import folders
        from dreambooth.training import checkpoint

        there = folders.complete_folders(self._place)
        if there and resume != "auto":
            raise UserError(f"{self._place} holds checkpoints of this run: type checkpoint.resume=auto, or another "
                            "storage.upload")
        names = [folders.first_of(uri.rpartition("/")[2]) for uri in there]
        if there and checkpoint.latest(self._folder) is None:
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
        from dreambooth.storage import folders
        from dreambooth.training import checkpoint

        new = [path for path in self._folder.glob("step-*")
               if path.name not in self._done and checkpoint.intact(path)]
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
