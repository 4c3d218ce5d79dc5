"""Provenance of a run: code version, git revision, command line."""

import os
import subprocess
import sys
from pathlib import Path

import dreambooth
from dreambooth.utils.masking import mask_urls
from dreambooth.utils.quoting import shell_line


def origin() -> dict[str, str]:
    """Return the version of dreambooth, the git revision, and this process's command line without credentials."""
    return {"version": dreambooth.__version__, "git_revision": _git_revision(), "command": _command()}


def _git_revision() -> str:
    folder = Path(__file__).parents[1]
    if not (folder.parent / ".git").exists():
        return os.environ.get("DREAMBOOTH_GIT_REVISION", "not a checkout")  # set when an image is built
    try:
        described = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
                                   capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


def _command() -> str:
    """Return the command line as the user typed it, without the credentials in its addresses."""
    script = Path(sys.argv[0])
    arguments = [mask_urls(word) for word in sys.argv[1:]]
    return shell_line([*([script.name] if script.suffix != ".py" else ["python", "-m", f"dreambooth.{script.stem}"]),
                       *arguments])
