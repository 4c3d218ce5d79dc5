"""A local AWS API for tests of SageMaker: moto's server with two behaviours of AWS that moto lacks.

moto has no StopTrainingJob, and its training jobs write no results. Here every training job is finished as soon as it
is created, and its output holds the result of a run.
"""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.support import s3_server

OBJECTIVE = 0.25  # in result.json of every job


class SageMakerServer(s3_server.Server):
    """The server, with a record of the calls of SageMaker's API."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, dict[str, Any]]] = []  # operation and its arguments
        self.services: set[str] = set()  # services of AWS that were called, such as s3 or iam

    def named(self, operation: str) -> list[dict[str, Any]]:
        """Return the arguments of every call of an operation, such as CreateTrainingJob."""
        return [request for name, request in self.requests if name == operation]

    def leave_running(self, name: str) -> None:
        """Make a training job that is still in progress, on the model of the first one."""
        job = copy.copy(next(iter(_jobs().values())))
        job.training_job_name, job.training_job_status = name, "InProgress"
        _jobs()[name] = job

    def _forward(self, environ: dict[str, Any], start: Any, kind: str | None) -> Any:
        if scope := re.search(r"Credential=[^/]+/\d+/[^/]+/([^/]+)/", environ.get("HTTP_AUTHORIZATION", "")):
            self.services.add(scope[1])
        target = environ.get("HTTP_X_AMZ_TARGET", "")
        if not target.startswith("SageMaker."):
            return super()._forward(environ, start, kind)
        operation, body = target.partition(".")[2], environ["wsgi.input"].read()
        environ["wsgi.input"].seek(0)
        request = json.loads(body or b"{}")
        self.requests.append((operation, request))
        if operation == "CreateTrainingJob":
            if request["TrainingJobName"] in _jobs():
                return _answer(start, "400 Bad Request", {
                    "__type": "ResourceInUse", "message": "Training job names must be unique within an AWS account"})
            self._write_result(request)
        if operation == "StopTrainingJob":
            return self._stop(request["TrainingJobName"], start)
        return super()._forward(environ, start, kind)

    def _write_result(self, request: dict[str, Any]) -> None:
        """Write what the container would have written, where moto says that the job's output is."""
        where = re.fullmatch(r"s3://([^/]+)/(.+)", f"{request['OutputDataConfig']['S3OutputPath'].rstrip('/')}/"
                             f"{request['TrainingJobName']}/output/model.tar.gz/result.json")
        assert where
        s3_server.plain_client().put_object(
            Bucket=where[1], Key=where[2], Body=json.dumps({"objective": OBJECTIVE, "step": 2}).encode())

    def _stop(self, name: str, start: Any) -> list[bytes]:
        job = _jobs().get(name)
        if job is None:
            return _answer(start, "400 Bad Request", {
                "__type": "ValidationException", "message": f"Requested resource {name} not found."})
        job.training_job_status = job.secondary_status = "Stopped"
        return _answer(start, "200 OK", None)


def _jobs() -> dict[str, Any]:
    """moto's training jobs, by name."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.sagemaker.models import sagemaker_backends

    jobs: dict[str, Any] = sagemaker_backends[DEFAULT_ACCOUNT_ID]["us-east-1"].training_jobs
    return jobs


def _answer(start: Any, status: str, content: dict[str, Any] | None) -> list[bytes]:
    text = b"" if content is None else json.dumps(content).encode()
    start(status, [("Content-Type", "application/x-amz-json-1.1"), ("Content-Length", str(len(text)))])
    return [text]


@contextmanager
def serving() -> Iterator[SageMakerServer]:
    """Run an empty server, with environment variables that make boto3 and the SDK use it.

    The SDK keeps its clients for the whole process. Inside the context, it has none of another test's server.
    """
    from sagemaker.core.utils.utils import SageMakerClient

    with (patch.dict(type(SageMakerClient)._instances, clear=True), patch.object(s3_server, "Server", SageMakerServer),
          s3_server.serving() as server):
        assert isinstance(server, SageMakerServer)
        yield server
