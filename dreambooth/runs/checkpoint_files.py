"""Checkpoint folders on disk: which are whole, which is the newest, which may go. No torch."""

import json
import logging
from pathlib import Path

from dreambooth.utils import atomic_files

log = logging.getLogger(__name__)

STATE = "state.json"


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` intact checkpoints; a damaged one is never kept in the place of a good one."""
    steps = _steps(folder)
    kept = [path for path in steps if intact(path)][-keep:]
    for old in steps:
        if old not in kept:
            atomic_files.remove_folder(old)


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint, or None. A damaged one is passed over with a warning."""
    for candidate in reversed(_steps(folder)):
        if intact(candidate):
            return candidate
        log.warning("checkpoint %s is damaged and is passed over", candidate)
    return None


def intact(path: Path) -> bool:
    """True if every file of the checkpoint has the size it was written with."""
    try:
        sizes = json.loads((path / STATE).read_text(encoding="utf-8"))["sizes"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def step_of(path: Path) -> int:
    """How many completed steps a checkpoint folder holds."""
    return int(json.loads((path / STATE).read_text(encoding="utf-8"))["step"])


def _steps(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.glob("step-*") if entry.is_dir()), key=atomic_files.number_of)
