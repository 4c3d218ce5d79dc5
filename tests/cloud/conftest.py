"""What the tests of SageMaker share: botocore's description of each service, read once."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from botocore.loaders import JSONFileLoader


@pytest.fixture(scope="session", autouse=True)
def services_are_read_once() -> Iterator[None]:
    """Each new client reads the description of its service, which takes a second for SageMaker."""
    read = cache(lambda path: load_file(JSONFileLoader(), path))
    load_file = JSONFileLoader.load_file

    def load(loader: JSONFileLoader, path: str) -> Any:
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", load)
        yield
