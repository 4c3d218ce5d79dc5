"""Where a run came from: code version, git revision, command."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import dreambooth


def origin() -> dict[str, str]:
    """Version, git revision of the code (of a checkout or an image) and the command as it was typed."""
    return {"version": dreambooth.__version__, "git_revision": _revision(), "command": _command()}


def _revision() -> str:
    folder = Path(__file__).parents[1]
    if not (folder.parent / ".git").exists():
        return os.environ.get("DREAMBOOTH_GIT_REVISION", "not a checkout")  # an image knows it from its build
    try:
        told = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
                              capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()


def _command() -> str:
    """As it was typed, but for credentials in an address."""
    script = Path(sys.argv[0])
    words = [clean(word) for word in sys.argv[1:]]
    return shlex.join([*([script.name] if script.suffix != ".py" else ["python", "-m", f"dreambooth.{script.stem}"]),
                       *words])


def clean(text: str, uri: str = "") -> str:
    """The text without user:password@ and password= of any address in it, nor the bare password of `uri`."""
    found = re.match(r"[\w+.-]+://([^/\s]*)@", uri)
    text = re.sub(r"(?<=://)[^/\s]*@", "", text)
    for secret in (found[1] + "@", found[1].partition(":")[2]) if found else ():
        text = text.replace(secret, "") if secret else text
    return re.sub(r"(password|token)=[^&\s]+", r"\1=***", text)
