"""One Slurm for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.schedulers.slurm_cluster import Slurm, slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    with slurm() as cluster:
        yield cluster
