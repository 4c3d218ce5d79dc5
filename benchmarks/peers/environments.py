"""An environment of its own for each peer: its packages, above those of this project, which provide PyTorch."""

import hashlib
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from peers.tasks import NotSupported, Trainer


def make_environment(trainer: Trainer, folder: Path) -> Path:
    """Create the environment of a trainer in `folder` if it is missing, and return its path.

    The packages of this project follow on its import path, so that PyTorch is not installed again (3 GB). What the peer
    pins is installed without its dependencies: they are in this project's environment, or in the trainer's own list.
    With an interpreter of its own, a trainer gets all its packages and their dependencies, and PyTorch in the version
    of this project.

    Raises:
        NotSupported: the trainer needs a newer Python, or pip failed.
    """
    python = str(trainer.interpreter or sys.executable)
    own_version = _python_version(python)
    if own_version < trainer.python:
        needed, own = (".".join(map(str, numbers)) for numbers in (trainer.python, own_version))
        raise NotSupported(f"needs Python {needed} or newer, and {python} is {own}")
    packages = trainer.packages
    if trainer.interpreter:
        packages = (*packages, f"torch=={version('torch').partition('+')[0]}")
    mark = hashlib.sha256("\n".join((str(own_version), *packages)).encode()).hexdigest()[:12]
    path = folder / f"{trainer.name}-{mark}"
    if (path / "ready").is_file():
        return path
    print(f"making the environment of {trainer.name}", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(path)], check=True)
    if not trainer.interpreter:
        folder = path / "lib" / f"python{own_version[0]}.{own_version[1]}" / "site-packages"
        (folder / "zz_project.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    found = subprocess.run([str(path / "bin" / "python"), "-m", "pip", "install", "--quiet",
                            "--disable-pip-version-check", *([] if trainer.interpreter else ["--no-deps"]), *packages],
                           check=False)
    if found.returncode:
        raise NotSupported("its packages could not be installed; pip's message is above the table")
    (path / "ready").touch()
    return path


def _python_version(python: str) -> tuple[int, int]:
    """Return the major and minor version of an interpreter.

    Raises:
        NotSupported: it is no Python.
    """
    try:
        words = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], check=True, text=True,
                               capture_output=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotSupported(f"{python} is no Python: {error}") from None
    return int(words[0]), int(words[1])
