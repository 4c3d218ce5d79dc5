"""The tracker with an MLflow that is dead, slow or refuses: no run stops or waits, nothing is lost."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import UserError
from dreambooth.tracking import mlflow_shipper
from dreambooth.tracking.journal import read
from dreambooth.tracking.model_registry import Registry
from dreambooth.tracking.tracker import open_tracker
from tests.tracking.mlflow_servers import (
    closed_port,
    drop,
    images,
    listening,
    mlflow_tracker,
    only_run,
    picture,
    points,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("short_waits")

# ---- MLflow with a dead or slow server


def test_what_a_dead_server_missed_is_sent_later(tmp_path: Path, uri: str) -> None:
    warnings: list[str] = []
    tracker = mlflow_tracker(tmp_path / "run", f"http://127.0.0.1:{closed_port()}", warnings)
    wait_for(lambda: tracker._shipper._failures > 2)
    for step in range(20):
        tracker.log_metrics(step, {"loss": float(step)})
    tracker.log_image(3, "k", picture(tmp_path / "run"))
    tracker.close("FINISHED")
    assert len(warnings) == 2 and "does not answer ([Errno 111] Connection refused)" in warnings[0]
    assert "repeat the command" in warnings[1] and "23 entries" in warnings[1]
    mlflow_tracker(tmp_path / "run", uri).close("FINISHED")
    assert points(uri, "loss") == [(step, float(step)) for step in range(20)] and len(images(uri)) == 1
    assert only_run(uri).info.status == "FINISHED"


def test_a_run_that_no_server_answered_records_its_server(tmp_path: Path) -> None:
    port = closed_port()
    tracker = mlflow_tracker(tmp_path / "run", f"http://u:s3cret@127.0.0.1:{port}")
    wait_for(lambda: tracker._shipper._failures > 1)
    tracker.close("FINISHED")
    state = json.loads((tmp_path / "run/mlflow.json").read_text())
    assert (state["uri"], state["run_id"]) == (f"http://127.0.0.1:{port}", None)


def test_a_server_that_comes_back_receives_everything_at_once(tmp_path: Path, uri: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    warnings, log_batch, down = list[str](), MlflowClient.log_batch, threading.Event()
    down.set()

    def flaky(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if down.is_set():
                raise ConnectionError("gone")
            return method(*args, **kwargs)
        return call

    monkeypatch.setattr(MlflowClient, "log_batch", flaky(log_batch))
    monkeypatch.setattr(MlflowClient, "get_run", flaky(MlflowClient.get_run))
    tracker = mlflow_tracker(tmp_path / "run", uri, warnings)
    tracker.log_metrics(1, {"loss": 1.0})
    wait_for(lambda: tracker._shipper._failures > 2)
    down.clear()
    wait_for(lambda: len(warnings) == 2)
    assert "does not answer (gone)" in warnings[0] and "is back" in warnings[1]
    wait_for(lambda: tracker._shipper.error is None, 2)
    assert points(uri, "loss") == [(1, 1.0)]
    tracker.close("FINISHED")


def test_a_server_that_hangs_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")  # what one call that blocks would take
    with listening(None) as (port, requests):
        warnings: list[str] = []
        tracker = mlflow_tracker(tmp_path / "run", f"http://127.0.0.1:{port}", warnings)
        wait_for(lambda: requests)
        begin = time.perf_counter()
        for step in range(1000):
            tracker.log_metrics(step, {"loss": 1.0})
        assert time.perf_counter() - begin < 50
        begin = time.perf_counter()
        tracker.close("FINISHED")
        assert time.perf_counter() - begin < 50
        assert "repeat the command" in warnings[-1]


def test_the_caller_never_calls_mlflow(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    callers: set[str] = set()
    for name in ("__init__", "log_batch", "log_image", "search_runs", "create_run", "update_run", "set_terminated"):
        method = getattr(MlflowClient, name)
        monkeypatch.setattr(MlflowClient, name, lambda *args, _method=method, **kwargs: (
            callers.add(threading.current_thread().name), _method(*args, **kwargs))[1])
    tracker = mlflow_tracker(tmp_path / "run", uri, required=True)
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.log_image(1, "k", picture(tmp_path))
    tracker.close("FINISHED")
    assert callers == {"mlflow"}


@pytest.mark.parametrize("code, text", [(401, "You are not authenticated"), (403, "Permission denied")])
def test_a_server_that_refuses_the_user_is_not_reported_as_dead(tmp_path: Path, code: int, text: str) -> None:
    answer = f"HTTP/1.1 {code} X\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}".encode()
    with listening(answer) as (port, _):
        warnings: list[str] = []
        tracker = mlflow_tracker(tmp_path / "run", f"http://127.0.0.1:{port}", warnings)
        wait_for(lambda: warnings)
        tracker.close("FINISHED")
        assert warnings[0].startswith(f"MLflow at http://127.0.0.1:{port} refuses this user (") and text in warnings[0]
        assert f"repeat the command when http://127.0.0.1:{port} accepts this user" in warnings[-1]
        with pytest.raises(UserError, match=r"refuses this user .*: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING"):
            mlflow_tracker(tmp_path / "run", f"http://127.0.0.1:{port}", required=True)
        with pytest.raises(UserError, match=r"refuses this user .*: set MLFLOW_TRACKING_USERNAME"):
            Registry(f"http://127.0.0.1:{port}").get_by_alias("model", "champion")


def test_entries_refused_for_one_user_are_sent_later_by_another(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user has READ permission on the run: it exists, and the server refuses every entry."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    warnings: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        tracker = mlflow_tracker(tmp_path / "run", uri, warnings)
        tracker.log_metrics(1, {"loss": 1.0})
        wait_for(lambda: tracker._shipper._failures > mlflow_shipper.MAX_ATTEMPTS + 1)
        drop(tracker)
    assert len(warnings) == 1 and "refuses this user (" in warnings[0]
    mlflow_tracker(tmp_path / "run", uri).close("FINISHED")
    assert points(uri, "loss") == [(1, 1.0)]


def test_required_and_dead_is_a_user_error_and_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(mlflow_shipper, "open_client", lambda uri: pytest.fail("imports MLflow for seconds"))
    with pytest.raises(UserError, match=r"Connection refused.*start the server.*tracking\.required=false"):
        open_tracker("mlflow", tmp_path / "run", run_root=tmp_path, run_name="r", required=True,
                     uri=f"http://127.0.0.1:{closed_port()}", warn=warnings.append)
    assert warnings == []


def test_a_database_that_cannot_be_read_needs_no_server(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError) as error:
        open_tracker("mlflow", tmp_path / "run", run_root=tmp_path, run_name="r", required=True)
    assert "start the server" not in str(error.value)
    assert f"make {tmp_path}/mlflow.db readable and writable, or move it away to get a new one" in str(error.value)


def test_a_server_that_was_down_delays_the_end_by_seconds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_shipper, "CLOSE_REMOTE", 60.0)
    monkeypatch.setattr(mlflow_shipper, "CLOSE_DOWN", 0.1, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    with listening(None) as (port, _):
        tracker = mlflow_tracker(tmp_path / "run", f"http://127.0.0.1:{port}", [])
        wait_for(lambda: tracker._shipper._failures)
        begin = time.perf_counter()
        tracker.close("FINISHED")
        assert time.perf_counter() - begin < 3


def test_required_and_gone_later_is_a_user_error_at_the_next_call(tmp_path: Path, uri: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = mlflow_tracker(tmp_path / "run", uri, required=True)
    wait_for(lambda: tracker._shipper.count_unsent() == 0)
    (tmp_path / "mlflow.db").write_bytes(b"no database any more" * 1000)
    tracker.log_metrics(1, {"loss": 1.0})
    wait_for(lambda: tracker._shipper.outage is not None)
    with pytest.raises(UserError, match="does not answer"):
        tracker.log_metrics(2, {"loss": 1.0})
    assert [entry["step"] for entry, _ in read(tracker.path) if "step" in entry] == [1, 2]
    tracker.close("FAILED")


def test_a_password_is_never_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = b"HTTP/1.1 500 X\r\nContent-Length: 18\r\nConnection: close\r\n\r\nhttp://u:s3cret@h/"
    for port in (closed_port(), None):
        with contextlib.nullcontext((port, [])) if port else listening(answer) as (number, _):
            warnings: list[str] = []
            server = f"http://u:s3cret@127.0.0.1:{number}"
            tracker = mlflow_tracker(tmp_path / str(port), server, warnings)
            wait_for(lambda warned=warnings: warned)
            tracker.close("FAILED")
            with pytest.raises(UserError) as error:
                mlflow_tracker(tmp_path / str(port), server, warnings, required=True)
            texts = [*warnings, str(error.value), *(f.read_text() for f in (tmp_path / str(port)).iterdir())]
            assert warnings and not [text for text in texts if "s3cret" in text], texts
    out, err = capfd.readouterr()
    assert "s3cret" not in out + err


@pytest.mark.slow
def test_leaving_without_close_ends_at_once(tmp_path: Path) -> None:
    code = ("import sys, time; from pathlib import Path; from dreambooth.tracking.tracker import open_tracker;"
            "r = Path(sys.argv[1]); t = open_tracker('mlflow', r / 'a', run_root=r, run_name='r', uri=sys.argv[2]);"
            "t.log_metrics(1, {'loss': 1.0}); time.sleep(2)")
    with listening(None) as (port, _):
        args = [sys.executable, "-c", code, str(tmp_path), f"http://127.0.0.1:{port}"]
        environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1000"}  # longer than the timeout of this test
        done = subprocess.run(args, timeout=300, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0
