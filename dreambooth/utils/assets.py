"""Paths of the files that ship with the package, such as the tiny base model and the demo photos."""

from pathlib import Path


def resolve_asset(source: str) -> str:
    """The path of `package:NAME`, which names a folder or file in dreambooth/assets/; any other text is returned as it
    is."""
    scheme, _, name = source.partition(":")
    return str(Path(__file__).parents[1] / "assets" / name) if scheme == "package" else source
