"""What several test files share: the image, built once, and a Python that starts at once."""

import time
from collections.abc import Iterator

import pytest

from tests.support import warm_python
from tests.support.docker_engine import engine
from tests.support.image import NAME, Image


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers share it
        warm_python.start()


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    with engine() as docker:
        began = time.monotonic()
        docker.build("cpu", NAME)
        print(f"the image was built in {time.monotonic() - began:.0f} s")
        made = Image(docker)
        yield made
        docker("image", "rm", f"{NAME}:{made.labels()['org.opencontainers.image.revision']}-cpu")  # one tag is enough
