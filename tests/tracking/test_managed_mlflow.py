"""An MLflow server that SageMaker manages: its ARN is the address, and requests have a signature (Version 4)."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.tracking.tracker import open_tracker
from tests.tracking.mlflow_servers import listening, only_run, points, wait_for

ARNS = ("arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/team",
        "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-app/app-ABC123")
DENIED = b'{"error_code": "PERMISSION_DENIED", "message": "not authorized"}'
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret",
                        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_TRACKING_URI": "of these tests"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow sets it, with its global address; later tests have their own
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)


@pytest.mark.parametrize("arn", ARNS)
def test_requests_are_signed_and_name_the_server(arn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(b"HTTP/1.1 403 Forbidden\r\nContent-Length: " + str(len(DENIED)).encode()
                   + b"\r\nConnection: close\r\n\r\n" + DENIED) as (port, requests):
        monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", f"http://127.0.0.1:{port}")
        warnings = list[str]()
        tracker = open_tracker("mlflow", tmp_path / "run", run_root=tmp_path, run_name="r", uri=arn,
                               warn=warnings.append)
        tracker.log_metrics(1, {"loss": 0.5})
        wait_for(lambda: warnings)
        tracker.close("FINISHED")
    [first, *_] = [request.decode() for request in requests]
    assert re.search(r"Authorization: AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/\d+/eu-west-1/sagemaker[a-z-]*/", first)
    assert re.search(rf"x-(mlflow-sm-tracking-server|sm-mlflow-app)-arn: {arn}\r", first)
    assert "refuses this user" in warnings[0] and "the actions of sagemaker-mlflow" in warnings[0]


def test_a_run_arrives_on_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", url.rpartition(":")[2], "--workers", "1",
         "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--default-artifact-root", str(tmp_path / "art")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", url)
        wait_for(lambda: _answers(url))
        warnings = list[str]()
        tracker = open_tracker("mlflow", tmp_path / "run", run_root=tmp_path, run_name="r", uri=ARNS[0],
                               warn=warnings.append, required=True)
        tracker.log_params({"train.seed": "1"})
        for step in range(1, 4):
            tracker.log_metrics(step, {"loss": 1 / step})
        tracker.close("FINISHED")
        assert warnings == [] and points(url, "loss") == [(step, 1 / step) for step in range(1, 4)]
        assert only_run(url).data.params == {"train.seed": "1"}
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    import requests

    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.ConnectionError:
        return False
