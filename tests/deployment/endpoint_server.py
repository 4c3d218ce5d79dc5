"""A local server with S3, CloudWatch (moto) and the endpoints of endpoint_service.py, for tests of the real command."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from io import BytesIO
from typing import Any
from unittest.mock import patch

from tests.deployment.endpoint_service import EndpointService, Refusal
from tests.support import s3_server

PREFIXES = ("SageMaker", "AnyScaleFrontendService")  # of the header X-Amz-Target: SageMaker, Application Auto Scaling


class EndpointServer(s3_server.Server):
    """The server. `service` holds the endpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.service = EndpointService()

    def _forward(self, environ: dict[str, Any], start: Any, kind: str | None) -> Any:
        prefix, _, operation = environ.get("HTTP_X_AMZ_TARGET", "").partition(".")
        if prefix not in PREFIXES:
            return super()._forward(environ, start, kind)
        body = environ["wsgi.input"].read()
        environ["wsgi.input"] = BytesIO(body)
        request = json.loads(body or b"{}")
        self.service.calls.append((operation, request))
        try:
            status, content = "200 OK", self.service.answer(operation, request)
        except Refusal as refusal:
            status, content = f"{refusal.status} Error", {"__type": refusal.code, "message": str(refusal)}
        text = json.dumps(content, default=datetime.timestamp)
        start(status, [("Content-Type", "application/x-amz-json-1.1"), ("Content-Length", str(len(text.encode())))])
        return [text.encode()]


@contextmanager
def serving_endpoints() -> Iterator[EndpointServer]:
    """Run an empty server, with environment variables that make boto3 use it."""
    with patch.object(s3_server, "Server", EndpointServer), s3_server.serving() as server:
        assert isinstance(server, EndpointServer)
        yield server
