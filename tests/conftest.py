"""What several test files share: the image, built once, and a Python that starts at once."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support import warm_python
from tests.support.docker_engine import engine
from tests.support.image import NAME, Image


def pytest_configure(config: pytest.Config) -> None:
    warm_python.share_files()
    if not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers share it
        warm_python.start()


def pytest_collection_finish() -> None:
    """Let the garbage collector skip the imported modules, and run less often: 8 % less CPU time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    with engine() as docker:
        began = time.monotonic()
        docker.build("cpu", NAME)
        print(f"the image was built in {time.monotonic() - began:.0f} s")
        made = Image(docker)
        yield made
        docker("image", "rm", f"{NAME}:{made.labels()['org.opencontainers.image.revision']}-cpu")  # one tag is enough


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder


@pytest.fixture(scope="session")
def flow_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of the families of flow matching: to be read only."""
    from tests.support.tiny_models import FLOW_FAMILIES, make_flow

    return {family: make_flow(family, tmp_path_factory.mktemp("flow") / family) for family in FLOW_FAMILIES}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of Stable Diffusion 1.x, 2.x and SDXL: to be read only."""
    from tests.support.tiny_models import FAMILIES, make

    return {family: make(family, tmp_path_factory.mktemp("bases") / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def empty_db(shared: Path) -> Path:
    """An MLflow database with its tables, which take seconds to create: for tests to copy to RUN_ROOT/mlflow.db."""
    path = shared / "empty.db"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            from mlflow import MlflowClient

            MlflowClient(f"sqlite:///{path}.new")
            Path(f"{path}.new").rename(path)
    return path


@pytest.fixture(scope="session")
def uninterrupted(shared: Path) -> Path:
    """A run of 8 steps that all workers of pytest-xdist share: to be read only."""
    from tests.support.faults import train  # not before the warm Python has its name
    from tests.support.runs import the_run

    folder = shared / "uninterrupted"
    with FileLock(f"{folder}.lock"):
        if not list(folder.glob("demo-*/result.json")):
            assert train(folder) == 0
    return the_run(folder)
