"""The folder of compiled code, from which later runs of the same recipe load what an earlier run has compiled.

torch.compile reads the folder from TORCHINDUCTOR_CACHE_DIR. It executes what it finds there: graphs as pickles, and
kernels as shared libraries. Its default is a folder in the directory for temporary files that is named after the user,
which other users of the machine can create first. This module uses a folder in the user's home instead, and refuses one
to which other users may write.
"""

import os
import stat
from pathlib import Path

from dreambooth.errors import UserError
from dreambooth.utils.quoting import shell_word

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # Triton keeps its kernels in this folder, too
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def set_folder(setting: str | None) -> Path:
    """Create the folder, let torch.compile use it from now on, and return its path.

    Args:
        setting: train.compile_cache; None: the folder that TORCHINDUCTOR_CACHE_DIR names, or that of `default_folder`.

    Raises:
        UserError: the folder cannot be created, or it belongs to another user, or other users may write to it.
    """
    folder = Path(setting or os.environ.get(VARIABLE) or default_folder()).expanduser().absolute()
    another = "type train.compile_cache=FOLDER with a folder of your own"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder}, the folder of compiled code, cannot be used ({error}): {another}") from error
    if found.st_uid != os.geteuid():
        raise UserError(f"{folder}, the folder of compiled code, belongs to another user, whose code this run would "
                        f"execute: {another}")
    if found.st_mode & _OTHERS_WRITE:
        raise UserError(f"other users may write to {folder}, the folder of compiled code, and this run would execute "
                        f"what they write: type chmod go-w {shell_word(str(folder))}")
    os.environ[VARIABLE] = str(folder)
    return folder


def default_folder() -> str:
    """Return dreambooth/compiled in the user's folder for caches, which XDG_CACHE_HOME names (default ~/.cache)."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dreambooth" / "compiled")
