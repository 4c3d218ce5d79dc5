"""Permissions: files and folders get those that the umask gives, and a refused path is described with its owner."""

import grp
import os
import pwd
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dreambooth.utils import quoting


def create_empty(path: Path) -> int:
    """Create an empty file, and return its mode: what the umask, or a default ACL of the folder, gives to new files.

    The umask itself can be read only by changing it, which would change the files that other threads create meanwhile.
    """
    path.touch()
    return stat.S_IMODE(path.stat().st_mode)


def set_mode(path: Path, mode: int) -> None:
    """Set the mode of a file or folder, unless it has this mode or its file system has fixed permissions."""
    if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(OSError):
            path.chmod(mode)


def spread_mode(folder: Path, mode: int | None = None) -> None:
    """Set the mode of a folder and of the folders in it; files get the same mode without the right to execute.

    Libraries write weights that only their owner may read (safetensors), and copy the mode of the copied folder.

    Args:
        mode: the mode; None: the mode that the folder has now.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) if mode is None else mode
    set_mode(folder, mode)
    for entry in folder.rglob("*"):
        set_mode(entry, mode if entry.is_dir() else mode & 0o666)


@dataclass(frozen=True)
class Refusal:
    """A file or folder whose permissions refuse this user."""

    path: Path
    owner: str
    group: str
    mode: int
    own: bool  # whether this user is the owner

    def describe(self, mentioned: str = "") -> str:
        """Return owner, group and mode, as a part of a sentence that has named the path `mentioned` already."""
        name = "it" if str(self.path) == mentioned else str(self.path)
        return f"{name} belongs to {self.owner} and group {self.group}, mode {self.mode:04o}"

    def command(self, folder: Path | None = None) -> str:
        """Return what gives the permission for the path, or for the whole `folder`, and who may type it."""
        path = quoting.shell_word(str(folder or self.path))
        return f"chmod -R u+rwX {path}" if self.own else (
            f"chmod -R g+rwX {path} as {self.owner}, which shares it with its group")


def find_refusal(error: Exception) -> Refusal | None:
    """Return the file or folder whose permissions caused an error.

    Return None if the error is not about permissions, or names no path.
    """
    if not isinstance(error, PermissionError) or not isinstance(error.filename, str | os.PathLike):
        return None
    return refusal_of(_refusing(Path(error.filename2 or error.filename).absolute()))


def refusal_of(path: Path) -> Refusal:
    """Return the description of a path that is known to refuse this user."""
    info = path.stat()
    return Refusal(path, _owner(info.st_uid), _group(info.st_gid), stat.S_IMODE(info.st_mode),
                   info.st_uid == os.geteuid())


def first_unwritable(paths: Iterable[Path]) -> Path | None:
    """Return the first existing file or folder in which this user may not write; None if there is none."""
    for path in paths:
        if path.exists() and not _permits(path, os.W_OK):
            return path
    return None


def _refusing(path: Path) -> Path:
    """Return the path itself if it refuses this user, and otherwise the folder that contains it or would contain it.

    A link that refuses this user, or that leads to no file, is replaced by the path to which it leads.
    """
    with suppress(OSError):
        if path.is_symlink() and not _permits(path, os.R_OK | os.W_OK):
            path = Path(os.path.realpath(path))
    for present in (path, *path.parents):
        with suppress(OSError):
            present.lstat()
            return present.parent if present == path and _permits(path, os.R_OK | os.W_OK) else present
    return path


def _permits(path: Path, wanted: int) -> bool:
    try:
        return os.access(path, wanted | (os.X_OK if path.is_dir() else 0), effective_ids=True)
    except PermissionError:  # it is in a folder that this user may not open
        return False


def _owner(uid: int) -> str:
    """Return the name of a user. In a container, a user may have no name."""
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"user {uid}"


def _group(gid: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)
