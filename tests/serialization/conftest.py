"""Tiny models of each family."""

from pathlib import Path

import pytest

from tests.support.tiny_models import FAMILIES, FLOW_FAMILIES, make, make_flow


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of the architecture -> diffusers folder. Do not change these folders."""
    return {family: make(family, tmp_path_factory.mktemp("bases") / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def flow_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of the architecture -> diffusers folder of a family with a transformer. Do not change these folders."""
    return {family: make_flow(family, tmp_path_factory.mktemp("flow") / family) for family in FLOW_FAMILIES}
