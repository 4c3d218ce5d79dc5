"""Provenance of a run: code version, git revision, command line."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import dreambooth


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
    arguments = [remove_credentials(word) for word in sys.argv[1:]]
    return shlex.join([*([script.name] if script.suffix != ".py" else ["python", "-m", f"dreambooth.{script.stem}"]),
                       *arguments])


def remove_credentials(text: str, uri: str = "") -> str:
    """Return `text` without credentials: `user:password@` in addresses, and the values of `password=` and `token=`.

    Args:
        uri: an address with credentials. The same credentials are also removed where they stand in `text` without an
            address.
    """
    match = re.match(r"[\w+.-]+://([^/\s]*)@", uri)
    text = re.sub(r"(?<=://)[^/\s]*@", "", text)
    for secret in (match[1] + "@", match[1].partition(":")[2]) if match else ():
        text = text.replace(secret, "") if secret else text
    return re.sub(r"(password|token)=[^&\s]+", r"\1=***", text)
