"""Paths of the files that ship with the package, such as the tiny base model and the demo photos."""

from contextlib import suppress
from pathlib import Path
from typing import Any

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


def render_page(name: str, **values: Any) -> str:
    """Return an HTML page made from a Jinja template in dreambooth/assets/, in which every value is escaped.

    Args:
        name: file name of the template.
        values: what the template shows; HTML that must not be escaped is a markupsafe.Markup.

    Raises:
        jinja2.UndefinedError: the template needs a value that is missing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parents[1] / "assets"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name).render(values)


def expand_home(path: str) -> str:
    """Replace `~` or `~USER` at the start of a path by the home folder. If USER does not exist, return `path`."""
    if path.startswith("~"):
        with suppress(RuntimeError):  # no such user
            return str(Path(path).expanduser())
    return path
