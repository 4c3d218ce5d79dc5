"""What several test files share: the image, built once."""

import time
from collections.abc import Iterator

import pytest

from tests.support.docker_engine import engine
from tests.support.image import NAME, Image


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    with engine() as docker:
        began = time.monotonic()
        docker.make("cpu", NAME)
        print(f"the image was built in {time.monotonic() - began:.0f} s")
        made = Image(docker)
        yield made
        docker("image", "rm", f"{NAME}:{made.labels()['org.opencontainers.image.revision']}-cpu")  # one tag is enough
