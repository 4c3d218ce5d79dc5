"""An environment of its own for each peer: its packages, above those of this project, which provide PyTorch."""

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

from peers.tasks import NotSupported, Trainer


def make_environment(trainer: Trainer, folder: Path) -> Path:
    """Create the environment of a trainer in `folder` if it is missing, and return its path.

    The packages of this project follow on its import path, so that PyTorch is not installed again (3 GB). What the peer
    pins is installed without its dependencies: they are in this project's environment, or in the trainer's own list.

    Raises:
        NotSupported: the trainer needs a newer Python, or pip failed.
    """
    if sys.version_info < trainer.python:
        needed, own = (".".join(map(str, version)) for version in (trainer.python, sys.version_info[:2]))
        raise NotSupported(f"needs Python {needed} or newer, and this environment has {own}")
    mark = hashlib.sha256("\n".join((sys.version, *trainer.packages)).encode()).hexdigest()[:12]
    path = folder / f"{trainer.name}-{mark}"
    if (path / "ready").is_file():
        return path
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(path)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (path / "lib" / version / "site-packages" / "zz_project.pth").write_text(
        sysconfig.get_path("purelib") + "\n", "utf-8")
    found = subprocess.run([str(path / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps",
                            "--disable-pip-version-check", *trainer.packages], check=False)
    if found.returncode:
        raise NotSupported("its packages could not be installed; pip's message is above the table")
    (path / "ready").touch()
    return path
