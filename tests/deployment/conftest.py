"""What the tests of deployments share: an environment without settings of its own, and AWS in memory."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dreambooth.deployment import sagemaker_deployment
from dreambooth.deployment.autoscaler import Autoscaler
from dreambooth.deployment.endpoint_backend import EndpointBackend
from dreambooth.deployment.endpoint_requests import Artifact
from dreambooth.deployment.follow import Pace
from dreambooth.deployment.instances import Need
from dreambooth.deployment.model_artifact import DeployedModel
from dreambooth.deployment.options import Deploy
from dreambooth.deployment.sagemaker_deployment import Deployment
from dreambooth.storage import s3_bucket
from tests.cloud.conftest import credentials, environment, services_are_read_once
from tests.cloud.jobs import IMAGE, ROLE
from tests.deployment.endpoint_service import EndpointService

__all__ = ["credentials", "environment", "services_are_read_once"]
OPTIONS: dict[str, Any] = {"name": "toy", "run": "s3://bucket/runs/toy", "image": IMAGE, "role": ROLE,
                           "s3": "s3://bucket/dreambooth"}


class Console:
    """What the command has printed, and a clock that only its waiting moves."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seconds = 0.0

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def service(environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[EndpointService]:
    monkeypatch.setattr(s3_bucket, "PAUSE", 0.0)
    yield EndpointService()


@pytest.fixture
def console() -> Console:
    return Console()


@pytest.fixture
def deploy(service: EndpointService, console: Console, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command with options; the model is in S3, and drawing with it needs 10 GiB."""
    model = DeployedModel(Artifact("s3://bucket/runs/toy", source="s3://bucket/runs/toy"))
    monkeypatch.setattr(sagemaker_deployment, "find_model", lambda options: model)

    def run(**options: Any) -> None:
        typed = Deploy(**OPTIONS | options)
        backend = EndpointBackend(service.client("sagemaker"))
        autoscaler = Autoscaler(service.client("application-autoscaling"), service.client("cloudwatch"))
        pace = Pace(15, 60, console.sleep, lambda: console.seconds)
        Deployment(typed, backend, autoscaler, console.lines.append, pace,
                   lambda model, options: lambda hardware: Need(10.0, 6.0)).run()

    return run
