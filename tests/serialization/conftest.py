"""Tiny models of each family."""

from pathlib import Path

import pytest

from tests.support.tiny_models import FAMILIES, make


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of the architecture -> diffusers folder. Do not change these folders."""
    return {family: make(family, tmp_path_factory.mktemp("bases") / family) for family in FAMILIES}
