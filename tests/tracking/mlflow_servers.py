"""Trackers of the tests, servers that answer or do not, and what MLflow has received."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.tracking.tracker import MlflowTracker


def mlflow_tracker(folder: Path, uri: str, warnings: list[str] | None = None, **options: Any) -> MlflowTracker:
    warn = (warnings if warnings is not None else []).append
    return MlflowTracker(folder, uri=uri, experiment="e", run_name="r", warn=warn, **options)


def wait_for(true: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def drop(tracker: MlflowTracker) -> None:
    """Simulate SIGKILL: the thread ends; nothing is closed or sent any more."""
    tracker._shipper.stop(10)


def only_run(uri: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run


def points(uri: str, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return sorted((m.step, m.value) for m in MlflowClient(uri).get_metric_history(only_run(uri).info.run_id, key))


def images(uri: str) -> list[str]:
    from mlflow import MlflowClient

    files = MlflowClient(uri).list_artifacts(only_run(uri).info.run_id, "images")
    return [file.path for file in files if file.path.endswith(".png")]


def picture(folder: Path, name: str = "a.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder / name


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[tuple[int, list[bytes]]]:
    """A server that gives every request the same answer; None: it accepts connections and never answers.

    Yields its port and the requests so far.
    """
    requests: list[bytes] = []
    held: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                held.append(connection)
                requests.append(connection.recv(65536))
                if answer is not None:
                    connection.sendall(answer)
                    connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield server.getsockname()[1], requests
    finally:
        server.close()
        for connection in held:
            connection.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
