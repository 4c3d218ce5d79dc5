"""Checkpoint folders on disk: finds the newest intact one, and removes old and damaged ones. Imports no torch."""

import logging
from pathlib import Path

from dreambooth.storage import manifest
from dreambooth.utils import atomic_files

log = logging.getLogger(__name__)

STATE_FILE = "state.json"


def rotate(folder: Path, keep: int, newest: Path) -> None:
    """Keep the newest `keep` complete checkpoints in `folder` (see `is_complete`), and remove all others.

    Args:
        newest: the checkpoint that was just written. Checkpoints of later steps are removed too: they are damaged,
            because otherwise the run would have been resumed from one of them.
    """
    checkpoints, last = _list_checkpoints(folder), atomic_files.trailing_number(newest)
    kept = [path for path in checkpoints if atomic_files.trailing_number(path) <= last and is_complete(path)][-keep:]
    for path in checkpoints:
        if path not in kept:
            atomic_files.remove_folder(path)


def latest(folder: Path, before: Path | None = None) -> Path | None:
    """Return the path of the newest intact checkpoint, or None if there is no intact checkpoint.

    Log a warning for each damaged checkpoint that is newer than the returned checkpoint.

    Args:
        before: if this is a checkpoint, only checkpoints of earlier steps than its step are considered. None: all
            checkpoints are considered.
    """
    end = None if before is None else atomic_files.trailing_number(before)
    for path in reversed(_list_checkpoints(folder)):
        if end is not None and atomic_files.trailing_number(path) >= end:
            continue
        if (damage := find_damage(path)) is None:
            return path
        log.warning("checkpoint %s is damaged and is skipped (%s)", path, damage)
    return None


def find_damage(path: Path) -> str | None:
    """Return a description of the damage to a checkpoint, or None if every file is as it was written.

    All files are read and hashed. Checkpoints of earlier versions of this package have no checksums; of their files,
    only the sizes are compared.
    """
    return manifest.find_damage(path) or (None if is_complete(path) else "a file is missing or has another size")


def is_complete(path: Path) -> bool:
    """Return whether every file of a checkpoint has the size that was recorded when the checkpoint was written."""
    try:
        sizes = (atomic_files.read_object(path / STATE_FILE) or {})["sizes"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except PermissionError:
        raise
    except (OSError, KeyError, AttributeError, TypeError):
        return False


def step_of(path: Path) -> int:
    """Return the number of training steps that were completed when a checkpoint was written."""
    return int((atomic_files.read_object(path / STATE_FILE) or {})["step"])


def _list_checkpoints(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.glob("step-*") if entry.is_dir()), key=atomic_files.trailing_number)
