"""Paths of the linters that are installed with the extra `dev`."""

import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def tool(name: str) -> Path:
    """The path of a linter; fail if it is not installed."""
    assert (BIN / name).is_file(), f"{name} is missing: type make setup"
    return BIN / name