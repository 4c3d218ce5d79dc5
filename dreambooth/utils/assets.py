"""What ships with the package: the tiny base and the demo photos, named package:NAME in conf/."""

from pathlib import Path


def asset(source: str) -> str:
    """`package:NAME` is a folder that ships with dreambooth; anything else is taken as it is."""
    scheme, _, name = source.partition(":")
    return str(Path(__file__).parents[1] / "assets" / name) if scheme == "package" else source
