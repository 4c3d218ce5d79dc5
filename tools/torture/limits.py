"""Takes away disk space, inodes or file handles during a run: it must end with one clear sentence, and lose nothing."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.torture.trial import Place, TortureError, Trial

# What the run prints when its stage begins: the limit is reached from this moment on.
MOMENTS = {"class images": "class images 1/", "first checkpoint": "training 1/", "samples": "training 4/",
           "export": "training 7/"}
FREE_MIB = (0, 40)  # disk space that is left: for nothing, and for half a checkpoint
FILE_HANDLES = (2, 5, 10, 20, 40)  # that the run may open in addition to those it has at its start


def trials() -> list[Trial]:
    """The trials of this file. Those of disks mount a tmpfs, which needs root."""
    return [
        *(Trial("full disk", f"{moment}, {free} MiB free", fill_disk, (marker, free), needs_root=True)
          for moment, marker in MOMENTS.items() for free in FREE_MIB),
        *(Trial("no inode", moment, use_inodes, (marker,), needs_root=True) for moment, marker in MOMENTS.items()),
        *(Trial("no file handle", f"{count} more than at the start", limit_file_handles, (count,))
          for count in FILE_HANDLES)]


def fill_disk(place: Place, marker: str, free_mib: int) -> str:
    """Fill the disk, except for a number of MiB, when the run prints `marker`."""
    with mounted(place.folder, "size=1g"):
        outcome = run_until(place, marker, lambda: _fill(place.folder / "filler", free_mib))
        (place.folder / "filler").unlink()
        return f"{outcome}; then {place.repeat()}"


def use_inodes(place: Place, marker: str) -> str:
    """Create empty files until there is no inode left, when the run prints `marker`."""
    with mounted(place.folder, "size=1g,nr_inodes=2000"):
        fillers = place.folder / "fillers"
        outcome = run_until(place, marker, lambda: _use_inodes(fillers))
        for path in fillers.iterdir():
            path.unlink()
        fillers.rmdir()
        return f"{outcome}; then {place.repeat()}"


def limit_file_handles(place: Place, count: int) -> str:
    """Run with a limit on open files."""
    code = place.train(fault="few_file_handles", seed=count)
    return f"{place.outcome(code)}; then {place.repeat()}"


def run_until(place: Place, marker: str, limit: Callable[[], None]) -> str:
    """Start a run, call `limit` when it prints `marker`, and wait for its end. Return exit code and message."""
    process = place.start()
    while process.poll() is None and marker not in place.output():
        time.sleep(0.01)
    if process.poll() is not None:
        raise TortureError(f"the run ended before it printed {marker!r}: {place.sentence()}")
    limit()
    code = process.wait()
    place.check_output(code)
    if code not in (0, 1, 3):
        raise TortureError(f"exit code {code}: {place.sentence()}")
    return place.outcome(code)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Mount an empty tmpfs at `folder`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _fill(path: Path, free_mib: int) -> None:
    """Grow a file until `free_mib` MiB are free. The run may write at the same time, therefore in small pieces."""
    size = 0
    with path.open("wb") as file:
        for piece in (2**20, 2**12):
            with contextlib.suppress(OSError):  # this piece does not fit any more
                while (usage := os.statvfs(path.parent)).f_bavail * usage.f_frsize >= free_mib * 2**20 + piece:
                    os.posix_fallocate(file.fileno(), size, piece)
                    size += piece


def _use_inodes(folder: Path) -> None:
    folder.mkdir()
    with contextlib.suppress(OSError):
        for number in range(10**6):
            (folder / str(number)).touch()
