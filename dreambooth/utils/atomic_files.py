"""Atomic files and folders: written under a temporary name, synced to disk, then renamed into place.

A reader sees either the old or the new content, never a partial file, even after a crash. This module also computes
the digests that identify model files.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from stat import S_IMODE
from typing import Any

from dreambooth.errors import DoesNotFit, DreamBoothError, UserError
from dreambooth.utils import permissions

TEMPORARY_PREFIX = ".writing-"  # prefix of files and folders that are being written
REMOVED_PREFIX = ".removing-"  # prefix of folders that are being removed
SHARED_LEFTOVER_AGE = 3600.0  # seconds; a file that is being written changes more often
END_BYTES = 2**20  # bytes that `quick_digest` reads at each end of a file


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. After the block, sync the file to disk and rename it to `path`.

    The temporary name contains a random number and no process ID: pods that share a volume may have equal process IDs.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _naming_full_disk(path):
            mode = permissions.create_empty(temporary)
            yield temporary
            permissions.set_mode(temporary, mode)  # safetensors replaces the file by one that only its owner may read
            sync(temporary)
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_folder(path: Path, fresh: bool = False,
                 summary: tuple[str, Callable[[Path], bytes]] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill. After the block, sync the folder to disk, and replace `path` with this folder.

    Args:
        fresh: whether `path` must be missing or an empty folder, so that no files are replaced.
        summary: the name of a file that describes the other files, and the function that returns its content. A thread
            calls the function with the temporary folder while the other files are synced to disk.

    Raises:
        OSError: `fresh` is True, and `path` exists and is not an empty folder.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _naming_full_disk(path):
            temporary.mkdir(parents=True)
            mode = S_IMODE(temporary.stat().st_mode)
            yield temporary
            permissions.spread_mode(temporary, mode)
            with ThreadPoolExecutor(1) as pool:
                content = pool.submit(summary[1], temporary) if summary else None
                for entry in sorted(temporary.rglob("*")):
                    sync(entry)
            if summary and content:
                (temporary / summary[0]).write_bytes(content.result())
                sync(temporary / summary[0])
            sync(temporary)
            if path.exists() and not fresh:
                remove_folder(path)
            publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming_full_disk(path: Path) -> Iterator[None]:
    """Context manager that replaces each error of a full disk by an OSError that names `path`.

    The OSError of a failed write names no file, and safetensors raises an error that is not an OSError.
    """
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically. A number that is NaN or infinite becomes null, because JSON has no such numbers."""
    with write_file(path) as temporary:
        text = json.dumps(_without_nan(content), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file is missing or damaged, or contains no JSON object.

    Raises:
        PermissionError: this user may not read the file, which may well be intact.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def is_disk_full(error: Exception) -> bool:
    """Return whether an error of the system or of safetensors means that the disk or the user's quota is full."""
    if isinstance(error, DreamBoothError):  # its message may quote such an error
        return False
    found = re.search(r"\(os error (\d+)\)|\bcode: (\d+)", str(error))
    number = int(found[1] or found[2]) if found else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT)


def write_failure(what: str, error: Exception, otherwise: str) -> DreamBoothError:
    """Return the error to raise after something could not be written: DoesNotFit if the disk is full, else UserError.

    Args:
        what: what could not be written, and to which place.
        error: the error of the system or of safetensors.
        otherwise: what the user can type if the disk is not full; the end of the message of the UserError.
    """
    reason = getattr(error, "strerror", None) or error
    if refusal := permissions.find_refusal(error):
        reason = f"{reason}; {refusal.describe(what)}"
    if is_disk_full(error):
        return DoesNotFit(f"{what} could not be written ({reason}): free some space and repeat the command")
    return UserError(f"{what} could not be written ({reason}): {otherwise}")


def check_writable(folder: Path, otherwise: str) -> None:
    """Check that files can be written to a folder, which may be missing. Leave nothing behind.

    Call this before the work whose result goes to the folder.

    Args:
        otherwise: what the user can type if files cannot be written there; the end of the message of the UserError.

    Raises:
        UserError: the folder cannot be created, or files cannot be written to it.
        DoesNotFit: the disk is full.
    """
    missing: list[Path] = []
    try:
        missing += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise write_failure(str(folder), error, otherwise) from error
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def sync(path: Path) -> None:
    """Flush a file or folder to disk, and wait until the flush has finished."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, and sync the parent folder so that the rename survives a crash."""
    temporary.replace(path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder. Rename it first, so that no reader sees a partial folder under the original name."""
    removed = path.with_name(REMOVED_PREFIX + path.name)
    shutil.rmtree(removed, ignore_errors=True)
    path.replace(removed)
    shutil.rmtree(removed)


def remove_leftovers(folder: Path, min_age: float = 0.0) -> None:
    """Remove temporary files and folders that a killed process left in `folder`.

    Args:
        min_age: only entries that have not changed for this number of seconds are removed. Pass SHARED_LEFTOVER_AGE for
            a folder into which other runs may be writing.
    """
    for entry in folder.glob(".*"):
        if entry.name.startswith((TEMPORARY_PREFIX, REMOVED_PREFIX)) and _age(entry) >= min_age:
            with suppress(*([PermissionError] if min_age else [])):  # another user's, who removes it
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Return the seconds since a file or folder was changed; -1 if it no longer exists, as after it was renamed."""
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except FileNotFoundError:
        return -1.0


def trailing_number(path: Path) -> int:
    """Return the number at the end of a file name, as a sort key: 100 for `step-000100`, or -1 without a number."""
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def weights_digest(source: Path) -> str | None:
    """Return the `quick_digest` of the weight files of a local model, or None if `source` is a hub id.

    A .bin file counts only if diffusers would load it, that is, if its folder has no .safetensors file of the same
    variant. Developers must not change the digest of a model without .bin files: names of run folders depend on it.
    """
    if source.is_file():
        return quick_digest([source], source.parent)
    if not source.is_dir():
        return None
    paths = sorted(source.rglob("*.safetensors"))
    variants = {(path.parent, _variant(path)) for path in paths}
    paths += [path for path in sorted(source.rglob("*pytorch_model*.bin"))
              if (path.parent, _variant(path)) not in variants]
    return quick_digest(paths, source)


def full_digest(path: Path) -> str:
    """Return the SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def quick_digest(paths: Iterable[Path], folder: Path) -> str:
    """Return one SHA-256, in hex, of several files.

    For each file, hash its path relative to `folder`, its size, its first END_BYTES bytes and its last END_BYTES bytes.
    """
    digest = sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(END_BYTES))
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def _variant(path: Path) -> str:
    """Return the variant in the name of a weight file: `fp16` for model.fp16.safetensors, "" for model.safetensors."""
    return ".".join(re.sub(r"-\d+-of-\d+", "", path.name).split(".")[1:-1])


def _without_nan(value: Any) -> Any:
    """Return JSON content in which None replaces every number that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
