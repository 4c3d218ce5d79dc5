"""Files that are either whole or not there: written aside, synced to disk, then renamed into place."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

ASIDE = ".writing-"
GONE = ".removing-"
END = 2**20  # bytes read at each end of a weight file to know it by


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the yielded path; it becomes `path` once all of it is on disk.

    Its name is nobody else's: pods that share a volume have the same process numbers.
    """
    aside = path.with_name(f"{ASIDE}{secrets.token_hex(4)}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        sync(aside)
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, fresh: bool = False) -> Iterator[Path]:
    """Fill the yielded folder; it replaces `path` once all of it is on disk.

    Args:
        fresh: nothing is replaced but an empty folder.

    Raises:
        OSError: `fresh`, and something is there.
    """
    aside = path.with_name(ASIDE + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for entry in sorted(aside.rglob("*")):
            sync(entry)
        sync(aside)
        if path.exists() and not fresh:
            remove_folder(path)
        publish(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, whole or not there."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, path: Path) -> None:
    """Rename into place and make the rename durable."""
    aside.replace(path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Take a folder out of sight first, so that nobody ever reads half of it."""
    gone = path.with_name(GONE + path.name)
    shutil.rmtree(gone, ignore_errors=True)
    path.replace(gone)
    shutil.rmtree(gone)


def number_of(folder: Path) -> int:
    """100 for `step-000100`, to sort by; -1 for a name without a number."""
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def weights_digest(folder: Path) -> str | None:
    """What tells a local model's weights from others: sizes and both ends of every weight file. None for a hub id."""
    if folder.is_file():
        return ends_digest([folder], folder.parent)
    if not folder.is_dir():
        return None
    return ends_digest(sorted(folder.rglob("*.safetensors")), folder)


def whole_digest(path: Path) -> str:
    """What tells a file from all others, hex: every byte is read."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def ends_digest(paths: Iterable[Path], folder: Path) -> str:
    """The same of some files below `folder`."""
    digest = sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(END))
            file.seek(max(0, size - END))
            digest.update(file.read(END))
    return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Remove what a killed process left half done in `folder`."""
    for entry in folder.glob(".*"):
        if entry.name.startswith((ASIDE, GONE)):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
