"""Paths of the files that ship with the package, such as the tiny base model and the demo photos."""

from contextlib import suppress
from pathlib import Path

ASSET_SCHEME = "package:"  # beginning of the address of a file of this package


def conf_dir() -> Path:
    """Return the folder conf/, which lies inside an installed package, and beside the package in a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def resolve_asset(source: str) -> str:
    """Return the path that `source` stands for.

    `package:NAME` stands for a folder or file in dreambooth/assets/, and `~` at the start for the home folder. Any
    other string is returned unchanged.
    """
    if not source.startswith(ASSET_SCHEME):
        return expand_home(source)
    return str(Path(__file__).parents[1] / "assets" / source.removeprefix(ASSET_SCHEME))


def expand_home(path: str) -> str:
    """Replace `~` or `~USER` at the start of a path by the home folder. If USER does not exist, return `path`."""
    if path.startswith("~"):
        with suppress(RuntimeError):  # no such user
            return str(Path(path).expanduser())
    return path
