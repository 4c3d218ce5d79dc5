"""Paths of the files that ship with the package, such as the tiny base model and the demo photos."""

from pathlib import Path


def resolve_asset(source: str) -> str:
    """Return the path of `package:NAME`, a folder or file in dreambooth/assets/. Return any other string unchanged."""
    scheme, _, name = source.partition(":")
    return str(Path(__file__).parents[1] / "assets" / name) if scheme == "package" else source
