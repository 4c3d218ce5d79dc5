"""Programs that check files."""

import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def tool(name: str) -> Path:
    """A linter of the extra `dev`."""
    assert (BIN / name).is_file(), f"{name} is missing: make setup"
    return BIN / name