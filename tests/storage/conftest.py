"""A local S3 with the bucket `tests`, in which each test has a folder of its own."""

import re
from collections.abc import Iterator

import pytest

from dreambooth.storage import manifest, s3_bucket
from tests.support.s3_server import PART_SIZE, Server, plain_client, serving


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        plain_client().create_bucket(Bucket="tests")
        plain_client().create_bucket(Bucket="faults")
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(s3_bucket, "PAUSE", 0.01)
    monkeypatch.setattr(manifest, "PART_SIZE", PART_SIZE)
    running.calls.clear()
    yield running
    running.fault = lambda number, method: None


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    return "s3://tests/" + re.sub(r"\W", "-", request.node.name)
