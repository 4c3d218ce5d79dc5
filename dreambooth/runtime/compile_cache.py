"""The folder of compiled code, from which later runs of the same recipe load what an earlier run has compiled.

torch.compile reads the folder from TORCHINDUCTOR_CACHE_DIR. It executes what it finds there: graphs as pickles, and
kernels as shared libraries. Its default is a folder in the directory for temporary files that is named after the user,
which other users of the machine can create first. This module uses a folder in the user's home instead, and refuses one
that other users can change. The headers of kernels stay in torch's default folder, which is checked as well.
"""

import os
import platform
import stat
import tempfile
from hashlib import sha256
from pathlib import Path

from dreambooth.config.schema import Train
from dreambooth.errors import UserError

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
USER_FOLDER = os.environ.get(VARIABLE)  # before torch, which sets the variable when parts of it are imported
CPU_INFO = Path("/proc/cpuinfo")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def prepare(train: Train) -> dict[str, str]:
    """Call `set_folder` if a run compiles its model. Return a row about the folder for the table of the run, or {}.

    Raises:
        UserError: as in `set_folder`.
    """
    if not train.compile:
        return {}
    folder = set_folder(train.compile_cache)
    return {"compiled": f"in {folder}; without code for this recipe there, the first step takes minutes"}


def set_folder(setting: str | None) -> Path:
    """Create the folder, let torch.compile use it from now on, and return its path.

    Args:
        setting: train.compile_cache; None: the folder that TORCHINDUCTOR_CACHE_DIR names, or that of `default_folder`.
            If the latter cannot be created, a temporary folder takes its place.

    Raises:
        UserError: a folder cannot be created or written, or other users can change what is in it.
    """
    advice = "type train.compile_cache=FOLDER with a new folder of your own"
    chosen = setting or USER_FOLDER
    try:
        folder = _make_private(Path(chosen or default_folder()).expanduser() / _cpu_name(), advice)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        if chosen:
            raise UserError(f"{chosen} cannot be the folder of compiled code ({error}): {advice}") from None
        folder = Path(tempfile.mkdtemp(prefix="dreambooth-compiled-"))
    os.environ[VARIABLE] = str(folder)
    _check_headers()
    return folder


def default_folder() -> str:
    """Return dreambooth/compiled in the user's folder for caches, which XDG_CACHE_HOME names (default ~/.cache)."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dreambooth" / "compiled")


def _cpu_name() -> str:
    """Return a name for the kind of CPU, because kernels use all instructions of the CPU that compiled them.

    Machines of a cluster can share a home and differ in their CPUs. torch distinguishes only a few kinds.
    """
    try:
        lines = CPU_INFO.read_text("utf-8").splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{sha256(' '.join(sorted(flags.split())).encode()).hexdigest()[:12]}"


def _check_headers() -> None:
    """Check the folder of precompiled headers, which torch keeps in its default folder whatever the variable says."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    advice = "type export TMPDIR=FOLDER with a new folder of your own"
    try:
        _make_private(Path(default_cache_dir()), advice)
    except OSError as error:
        raise UserError(f"torch.compile cannot create {default_cache_dir()} ({error}): {advice}") from None


def _make_private(path: Path, advice: str) -> Path:
    """Create a folder that only this user may enter, or check an existing one. Return its path without links.

    Raises:
        OSError: the folder cannot be created or written.
        UserError: the folder or one of its parents belongs to another user, or others may write there.
    """
    for part in (*reversed(path.parents), path):  # with parents=True, the umask alone would give the parents' modes
        part.mkdir(mode=0o700, exist_ok=True)
    folder = path.resolve()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError("it cannot be written")
    for part in (folder, *folder.parents):
        found = part.stat()
        shared = found.st_mode & _OTHERS_WRITE and not (part != folder and found.st_mode & stat.S_ISVTX)
        if shared or found.st_uid not in (os.geteuid(), 0):
            raise UserError(f"other users can change {part}, and this run would execute what they put into {folder}, "
                            f"the folder of compiled code: {advice}")
    return folder
