"""Checkpoint folders on disk: finds the newest intact one, and removes old and damaged ones. Imports no torch."""

import json
import logging
from pathlib import Path

from dreambooth.utils import atomic_files

log = logging.getLogger(__name__)

STATE_FILE = "state.json"


def rotate(folder: Path, keep: int) -> None:
    """Remove every checkpoint except the newest `keep` intact checkpoints. Damaged checkpoints are always removed."""
    checkpoints = _list_checkpoints(folder)
    kept = [path for path in checkpoints if is_intact(path)][-keep:]
    for path in checkpoints:
        if path not in kept:
            atomic_files.remove_folder(path)


def latest(folder: Path) -> Path | None:
    """Return the path of the newest intact checkpoint, or None if there is no intact checkpoint.

    Log a warning for each damaged checkpoint that is newer than the returned checkpoint.
    """
    for path in reversed(_list_checkpoints(folder)):
        if is_intact(path):
            return path
        log.warning("checkpoint %s is damaged and is skipped", path)
    return None


def is_intact(path: Path) -> bool:
    """Return whether every file of a checkpoint has the size that was recorded when the checkpoint was written."""
    try:
        sizes = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["sizes"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def step_of(path: Path) -> int:
    """Return the number of training steps that were completed when a checkpoint was written."""
    return int(json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["step"])


def _list_checkpoints(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.glob("step-*") if entry.is_dir()), key=atomic_files.trailing_number)
