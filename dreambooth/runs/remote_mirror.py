"""Copies a run to S3: the checkpoints during training, and the result at the end."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth.config.schema import Storage
from dreambooth.errors import DreamBoothError, UserError
from dreambooth.runs import budget_file
from dreambooth.runs.checkpoint_files import is_complete, latest
from dreambooth.storage import folders, manifest
from dreambooth.storage.manifest import Entries, hash_folder
from dreambooth.storage.run_inputs import is_main_process
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console
from dreambooth.utils.signals import StopRequest

RESULT_FILES = (".hydra", "model", "samples", budget_file.FILE, "contact_sheet.png", "evaluation.json", "metrics.jsonl",
                "result.json", "run.json")
POLL_SECONDS = 5.0  # seconds between two checks for new checkpoints
MAX_RETRY_SECONDS = 600.0  # longest pause before a failed copy is retried
log = logging.getLogger(__name__)


@contextmanager
def mirror_run(spec: Storage, run_dir: Path, resume: str, stop: StopRequest) -> Iterator[Callable[[Any], None]]:
    """Context manager that copies a run to S3 (`storage.upload`): new checkpoints during training, then the result.

    If this machine has no intact checkpoint of the run, the newest checkpoint in S3 is downloaded first. If a
    checkpoint cannot be copied, a warning is logged and the run continues. If storage.upload is not set, or this is not
    the main process, nothing is copied.

    Yields:
        A function that copies the result files to S3. After training, the caller calls this function with the Result.

    Args:
        resume: the setting checkpoint.resume.

    Raises:
        UserError: storage.upload cannot be accessed; S3 has checkpoints of the run and `resume` is not auto; the
            newest checkpoint in S3 cannot be downloaded; or the result cannot be copied.
        Interrupted: a stop was requested during the download or the copy of the result. The last checkpoint is copied
            even then, because this copy is how the run outlives its machine.
    """
    if spec.upload is None or not is_main_process():
        yield lambda result: None
        return
    uri = f"{spec.upload.rstrip('/')}/{run_dir.name}"
    mirror = CheckpointMirror(run_dir, uri, spec.parallel) if spec.checkpoints else None
    with stop.at_once():
        folders.check_destination(uri)  # before hours of training
        if mirror:
            mirror.download_latest(resume)
    if mirror:
        mirror.start()

    def copy_result(result: Any) -> None:
        with stop.at_once(f"the run is finished, its model is in {run_dir}; repeat the command to copy it to S3"):
            _copy_result(result.step, run_dir, uri, spec.parallel)

    try:
        yield copy_result
    finally:
        if mirror:
            mirror.finish()


def result_name(step: int) -> str:
    """Return the name of the S3 folder of a result.

    The name contains the number of steps, because a run that was extended has several results.
    """
    return f"result-{step:06d}"


def _copy_result(step: int, run_dir: Path, uri: str, parallel: int) -> None:
    """Copy the result files in `run_dir` to a subfolder of `uri`, the S3 address of the run.

    Args:
        step: number of completed steps; `result_name` makes the name of the subfolder from it.
        parallel: number of parallel transfers.
    """
    console, target = Console(), f"{uri}/{result_name(step)}"
    entries = hash_folder(run_dir, RESULT_FILES)
    target = folders.upload_with_fallback(run_dir, target, entries, console, parallel, core="model/")
    console.say(f"the result is complete in {target}")


class _Superseded(Exception):
    """Raised to abandon the copy of a checkpoint, because the run has ended and a newer checkpoint must be copied."""


class CheckpointMirror(threading.Thread):
    """Background thread that copies each new checkpoint of a run to S3, the newest checkpoint first.

    Damaged checkpoints, and checkpoints that are removed before or during the copy, are skipped. A failed copy is
    retried at growing intervals, because each attempt takes machine time from the training.
    """

    def __init__(self, run_dir: Path, uri: str, parallel: int) -> None:
        """Args:
            uri: S3 address of the run. Checkpoints are copied into its subfolder `checkpoints`.
            parallel: number of parallel transfers.
        """
        super().__init__(name="checkpoints to S3", daemon=True)
        self._folder, self._uri, self._parallel = run_dir / "checkpoints", f"{uri}/checkpoints", parallel
        self._copied: set[str] = set()
        self._failed = ""  # name of the last checkpoint that could not be copied
        self._retry_pause, self._retry_time = POLL_SECONDS, 0.0
        self._hashed: tuple[Any, Entries] = None, {}  # key of the last hashed checkpoint, and its manifest entries
        self._newest: Path | None = None  # the newest complete checkpoint, once the run has ended
        self._closing = threading.Event()

    def download_latest(self, resume: str) -> None:
        """Download the newest checkpoint from S3 into the run folder, unless the run folder has an intact checkpoint.

        Args:
            resume: the setting checkpoint.resume.

        Raises:
            UserError: S3 has checkpoints of the run and `resume` is not auto, or the download fails.
        """
        remote = folders.list_complete_folders(self._uri)
        if remote and resume != "auto":
            raise UserError(f"{self._uri} holds checkpoints of this run: type checkpoint.resume=auto, or another "
                            "storage.upload")
        names = [folders.strip_fallback_number(uri.rpartition("/")[2]) for uri in remote]
        if remote and latest(self._folder) is None:
            cache = self._folder / f"{atomic_files.TEMPORARY_PREFIX}s3"
            downloaded = folders.download(remote[-1], cache, Console(), self._parallel, complete=True)
            manifest.write(downloaded, folders.read_manifest(remote[-1]))  # the download has compared all files with it
            if (self._folder / names[-1]).exists():
                atomic_files.remove_folder(self._folder / names[-1])
            atomic_files.publish(downloaded, self._folder / names[-1])
        self._copied = set(names)

    def run(self) -> None:
        """Copy new checkpoints until `finish` is called."""
        while not self._closing.wait(POLL_SECONDS):
            self._copy_newest()

    def finish(self) -> None:
        """End the thread, then copy the newest checkpoint if it is not in S3 yet.

        The copy of an older checkpoint is abandoned, because the machine may have little time left.
        """
        self._newest = max(self._complete(), key=atomic_files.trailing_number, default=None)
        self._closing.set()
        self.join()
        self._retry_time = 0.0
        self._copy_newest()

    def _copy_newest(self) -> None:
        new = [path for path in self._complete() if path.name not in self._copied]
        for path in sorted(new, key=atomic_files.trailing_number)[-1:]:
            if path.name == self._failed and time.monotonic() < self._retry_time:
                continue
            try:
                folders.upload_with_fallback(
                    path, f"{self._uri}/{path.name}", self._entries(path), None, self._parallel,
                    check=partial(self._check_newest, path))
                self._copied.add(path.name)
            except (FileNotFoundError, _Superseded):  # the checkpoint was removed meanwhile, or a newer one is copied
                pass
            except DreamBoothError as error:
                if path.is_dir():
                    self._schedule_retry(path.name, error)

    def _complete(self) -> list[Path]:
        return [path for path in self._folder.glob("step-*") if is_complete(path)]

    def _check_newest(self, path: Path) -> None:
        """Raise _Superseded if the run has ended and a newer checkpoint than `path` still has to be copied to S3."""
        newest = self._newest
        if self._closing.is_set() and newest is not None and newest != path and newest.name not in self._copied:
            raise _Superseded

    def _entries(self, path: Path) -> Entries:
        """Return the manifest entries (paths and hashes of the files) of a checkpoint.

        The entries are read from the checkpoint's own manifest, so that the upload of a damaged checkpoint fails. A
        checkpoint of an earlier version of this package has no manifest; it is hashed in the first attempt to copy it.
        """
        key = path, path.stat().st_mtime_ns
        if self._hashed[0] != key:
            self._hashed = key, manifest.read(path) or hash_folder(path)
        return self._hashed[1]

    def _schedule_retry(self, name: str, error: DreamBoothError) -> None:
        if name != self._failed:
            log.warning("checkpoint %s is not in S3: %s", name, error)
            self._failed, self._retry_pause = name, POLL_SECONDS
        self._retry_pause = min(2 * self._retry_pause, MAX_RETRY_SECONDS)
        self._retry_time = time.monotonic() + self._retry_pause
