"""The journal and the trackers: no entry is lost or sent twice, and no server can stop or slow a run."""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreambooth.errors import UserError
from dreambooth.tracking import mlflow_shipper, tracker
from dreambooth.tracking.journal import Journal, batches, read
from dreambooth.tracking.model_registry import Registry
from dreambooth.tracking.tracker import JournalTracker, MlflowTracker, open_tracker


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SHIP_FROM_FIRST_STEP", False)
    monkeypatch.setattr(mlflow_shipper, "POLL_INTERVAL", 0.05)
    monkeypatch.setattr(mlflow_shipper, "BACKOFF", (0.05, 0.2))
    monkeypatch.setattr(mlflow_shipper, "CLOSE_REMOTE", 1.0)
    for name, value in {"REQUEST_TIMEOUT": "1", "REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_{name}", value)


@pytest.fixture(scope="session")
def empty_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables. MLflow takes seconds to create one, so the tests copy this one."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(tmp_path: Path, empty_db: Path) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty_db.read_bytes())
    return f"sqlite:///{tmp_path}/mlflow.db"


def mlflow_tracker(folder: Path, uri: str, warnings: list[str] | None = None, **options: Any) -> MlflowTracker:
    warn = (warnings if warnings is not None else []).append
    return MlflowTracker(folder, uri=uri, experiment="e", run_name="r", warn=warn, **options)


def wait_for(true: Callable[[], object], seconds: float = 30) -> None:
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


# ---- the journal


def fill(journal: Journal, steps: int) -> None:
    for step in range(steps):
        journal.log_metrics(step, {"loss": step / 7, "grad": math.inf if step % 2 else math.nan})
        journal.log_image(step, "samples/ä\n", journal.path.parent / f"{step}.png")
    journal.log_params({"lr": "1e-4", "prompt": "a\nb"})


def test_journal_form(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.log_metrics(3, {"loss": -math.inf})
    journal.log_image(3, "k", tmp_path / "samples" / "3.png")
    journal.log_artifact(Path("/etc/hostname"), "machine")
    first, second, third = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert first == {"time": first["time"], "step": 3, "metrics": {"loss": "-inf"}}
    assert abs(first["time"] / 1000 - time.time()) < 60
    assert (second["image"], second["key"]) == ("samples/3.png", "k")
    assert (third["artifact"], third["folder"]) == ("/etc/hostname", "machine")
    assert next(read(journal.path))[0]["metrics"] == {"loss": -math.inf}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_journal_cut_at_any_byte_is_continued(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    fill(Journal(path), 4)
    whole = path.read_bytes()
    entries = [str(entry) for entry, _ in read(path)]
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    left = [str(entry) for entry, _ in read(path)]
    assert left == entries[:whole[:cut].count(b"\n")]
    fill(Journal(path), 6)
    steps = [e["step"] for e, _ in read(path) if "metrics" in e]
    assert steps == list(range(6)) and [str(entry) for entry, _ in read(path)][:len(left)] == left
    assert sum("params" in e for e, _ in read(path)) == 1
    offsets = [0, *(after for _, after in read(path))]
    assert [next(read(path, offset))[1] for offset in offsets[:-1]] == offsets[1:]


def test_one_point_per_step_and_key(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    assert journal.log_metrics(1, {"loss": 1.0}) and not journal.log_metrics(1, {"loss": 2.0})
    assert journal.log_metrics(1, {"loss": 3.0, "lr": 0.5})
    assert [entry["metrics"] for entry, _ in read(journal.path)] == [{"loss": 1.0}, {"lr": 0.5}]


def test_repeated_entries_are_not_written_again(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("1")
    for first in (True, False):
        journal = Journal(tmp_path / "metrics.jsonl")
        assert journal.log_params({"a": "1"}) is journal.set_tags({"a": "1"}) is journal.log_artifact(file) is first
        assert journal.log_image(0, "k", file) is first
    file.write_text("22")
    assert journal.log_artifact(file) and not journal.log_artifact(file) and journal.log_artifact(file, "copy")
    assert journal.log_params({"a": "2"})
    with pytest.raises(ValueError, match="FINISHED"):
        journal.set_status("DONE")


def test_a_failed_write_leaves_the_journal_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path / "metrics.jsonl"), os.write
    journal.log_metrics(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: write(file, line[:9]))  # the disk is full after 9 bytes
        with pytest.raises(OSError, match="No space"):
            journal.log_metrics(2, {"loss": 2.0})
    assert journal.log_metrics(2, {"loss": 2.0})
    assert [entry["step"] for entry, _ in read(journal.path)] == [1, 2]


def test_a_damaged_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Journal(path).log_metrics(1, {"a": 1.0})
    with path.open("ab") as file:
        file.write(b"\0\0\0\n[1]\n7\n")
    journal = Journal(path)
    journal.log_metrics(2, {"a": 1.0})
    assert [entry["step"] for entry, _ in read(path)] == [1, 2]


@given(st.lists(st.one_of(st.just("status"), st.integers(1, 1500)), max_size=12))
def test_batches_keep_order_and_stay_small(kinds: list[Any]) -> None:
    entries = [({"status": "RUNNING"} if k == "status" else {"metrics": dict.fromkeys(map(str, range(k)), 0.0)}, i)
               for i, k in enumerate(kinds)]
    sent = list(batches(entries))
    assert [entry for batch, _ in sent for entry in batch] == [entry for entry, _ in entries]
    for batch, after in sent:
        assert entries[after][0] is batch[-1]
        assert len(batch) == 1 or sum(len(entry["metrics"]) for entry in batch) <= 1000


# ---- MLflow with a server that works


def test_null_tracker_only_journals(tmp_path: Path) -> None:
    tracker = open_tracker("none", tmp_path / "run", run_root=tmp_path, run_name="r")
    assert isinstance(tracker, JournalTracker) and tracker.log_metrics(1, {"loss": 1.0}) and tracker.url() is None
    tracker.close("FINISHED")
    tracker.close("FINISHED")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_sqlite_end_to_end(tmp_path: Path, uri: str) -> None:
    root, run, warnings = tmp_path, tmp_path / "run", list[str]()
    tracker = open_tracker("mlflow", run, run_root=root, run_name="r", experiment="e", warn=warnings.append)
    tracker.log_params({"lr": "1e-4", "long": "x" * 7000})
    tracker.set_tags({"git": "abc"})
    for step in range(1, 1301):
        tracker.log_metrics(step, {"loss": 1 / step, "lr": 1.0})
    tracker.log_image(5, "samples/prompt_0", picture(run / "samples"))
    (run / "result.json").write_text("{}")
    tracker.log_artifact(run / "result.json", "out")
    tracker.close("FINISHED")
    tracker.close("FAILED")
    mlflow_run = only_run(uri)
    assert points(uri, "loss") == [(step, 1 / step) for step in range(1, 1301)]
    assert mlflow_run.data.params == {"lr": "1e-4", "long": "x" * 6000} and mlflow_run.data.tags["git"] == "abc"
    assert (mlflow_run.info.status, mlflow_run.info.run_name, warnings) == ("FINISHED", "r", [])
    (image,) = images(uri)
    assert image.startswith("images/samples~prompt_0+step+5+timestamp+")
    from mlflow import MlflowClient
    assert [f.path for f in MlflowClient(uri).list_artifacts(mlflow_run.info.run_id, "out")] == ["out/result.json"]
    assert mlflow_run.info.artifact_uri.startswith((root / "mlartifacts").as_uri())


@pytest.mark.parametrize("lost", ["nothing", "mlflow.json", "offset"])
def test_a_killed_run_goes_on_in_the_same_mlflow_run(tmp_path: Path, uri: str, lost: str) -> None:
    run, state = tmp_path / "run", tmp_path / "run" / "mlflow.json"
    tracker = mlflow_tracker(run, uri)
    for step in range(5):
        tracker.log_metrics(step, {"loss": float(step)})
    tracker.log_image(1, "k", picture(run))
    wait_for(lambda: tracker._shipper.count_unsent() == 0)
    tracker.log_metrics(5, {"loss": 5.0})
    drop(tracker)
    before = json.loads(state.read_text())
    if lost == "mlflow.json":  # killed after the run was created, before its ID was saved
        state.write_text(json.dumps({"token": before["token"]}))
    elif lost == "offset":  # killed after the server's answer, before the offset was saved
        state.write_text(json.dumps(before | {"offset": 0}))
    again = mlflow_tracker(run, uri)
    for step in range(3, 8):  # resumed at step 2, with other values: the first ones stay
        again.log_metrics(step, {"loss": float(step) + (0.5 if step < 6 else 0)})
    again.log_image(1, "k", run / "a.png")
    wait_for(lambda: again._shipper.count_unsent() == 0)
    assert only_run(uri).info.status == "RUNNING"
    again.close("FINISHED")
    assert only_run(uri).info.run_id == before["run_id"] and only_run(uri).info.status == "FINISHED"
    assert points(uri, "loss") == [(step, float(step)) for step in range(8)]
    assert len(images(uri)) == 1


def test_a_finished_run_that_is_continued_is_running(tmp_path: Path, uri: str) -> None:
    mlflow_tracker(tmp_path / "run", uri).close("FINISHED")
    tracker = mlflow_tracker(tmp_path / "run", uri)
    wait_for(lambda: only_run(uri).info.status == "RUNNING")
    tracker.close("KILLED")
    assert only_run(uri).info.status == "KILLED"


@pytest.mark.parametrize("first", ["FINISHED", "KILLED", None])
@pytest.mark.parametrize("kind", ["mlflow", "none"])
def test_reading_an_ended_run_keeps_its_status_and_end_time(
    tmp_path: Path, uri: str, kind: str, first: str | None
) -> None:
    def opened(**more: Any) -> Any:
        return open_tracker(kind, tmp_path / "run", run_root=tmp_path, run_name="r", experiment="e", **more)

    trained = opened()
    trained.set_status("RUNNING")
    trained.close(first)
    before = [entry for entry, _ in read(trained.path) if "status" in entry]
    time.sleep(0.01)
    reader = opened(update_status=False)
    reader.log_metrics(9, {"subject_similarity": 0.5})
    reader.close("FAILED")
    statuses = [entry for entry, _ in read(trained.path) if "status" in entry]
    assert statuses == before if first else [entry["status"] for entry in statuses] == [
        *(entry["status"] for entry in before), "FAILED"], "a run without a final status gets one"
    if kind == "mlflow":
        run = only_run(uri)
        assert (run.info.status, run.info.end_time) == (statuses[-1]["status"], statuses[-1]["time"])
        assert points(uri, "subject_similarity") == [(9, 0.5)]


def test_a_refused_entry_does_not_block_the_rest(tmp_path: Path, uri: str) -> None:
    warnings: list[str] = []
    tracker = mlflow_tracker(tmp_path / "run", uri, warnings)
    tracker.log_params({"lr": "1", "batch": "1"})
    tracker.log_params({"lr": "2", "seed": "7"})
    tracker.log_image(1, "k", tmp_path / "missing.png")
    tracker.log_metrics(1, {"loss": 1.0, "bad\tname": 2.0, "lr": 3.0})
    tracker.close("FINISHED")
    mlflow_run = only_run(uri)
    assert mlflow_run.data.params == {"lr": "1", "batch": "1", "seed": "7"}
    assert mlflow_run.data.metrics == {"loss": 1.0, "lr": 3.0} and mlflow_run.info.status == "FINISHED"
    assert len(warnings) == 3
    assert all(name in text for name, text in zip(("param lr", "missing.png", "bad\tname"), warnings, strict=True))


def test_an_entry_that_the_server_keeps_failing_on_is_skipped(tmp_path: Path, uri: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no bucket")

    monkeypatch.setattr(MlflowClient, "log_artifact", fail)
    warnings: list[str] = []
    tracker = mlflow_tracker(tmp_path / "run", uri, warnings)
    tracker.log_artifact(picture(tmp_path))
    tracker.close("FINISHED")
    assert only_run(uri).info.status == "FINISHED"
    assert "fails (no bucket)" in warnings[0] and "a.png" in warnings[1] and "is back" in warnings[2]


def test_a_deleted_run_is_created_again(tmp_path: Path, uri: str) -> None:
    from mlflow import MlflowClient

    tracker = mlflow_tracker(tmp_path / "run", uri)
    tracker.log_metrics(1, {"loss": 1.0})
    wait_for(lambda: tracker._shipper.count_unsent() == 0)
    old = only_run(uri).info.run_id
    MlflowClient(uri).delete_run(old)
    tracker.log_metrics(2, {"loss": 2.0})
    tracker.close("FINISHED")
    assert only_run(uri).info.run_id != old and points(uri, "loss") == [(1, 1.0), (2, 2.0)]


def test_two_processes_open_one_fresh_database(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from dreambooth.tracking.tracker import open_tracker;"
            "root = Path(sys.argv[1]);"
            "t = open_tracker('mlflow', root / sys.argv[2], run_root=root, run_name='r', required=True);"
            "t.log_metrics(1, {'loss': 1.0}); t.close('FINISHED')")
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stderr=subprocess.PIPE, text=True)
            for name in ("a", "b")]  # fresh interpreters: MLflow reads its log level when it is imported
    ends = [(run.communicate(timeout=600)[1], run.returncode) for run in runs]
    assert ends == [("", 0), ("", 0)]
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    finished = client.search_runs([client.get_experiment_by_name("dreambooth").experiment_id])
    assert [run.info.status for run in finished] == ["FINISHED"] * 2


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
    assert points(uri, "loss") == [(1, 1.0)]
    tracker.close("FINISHED")


def test_a_server_that_hangs_does_not_block(tmp_path: Path) -> None:
    with listening(None) as (port, requests):
        warnings: list[str] = []
        tracker = mlflow_tracker(tmp_path / "run", f"http://127.0.0.1:{port}", warnings)
        wait_for(lambda: requests)
        begin = time.perf_counter()
        for step in range(1000):
            tracker.log_metrics(step, {"loss": 1.0})
        assert time.perf_counter() - begin < 1
        begin = time.perf_counter()
        tracker.close("FINISHED")
        assert time.perf_counter() - begin < 5
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


def test_required_and_dead_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Connection refused.*tracking\.required=false"):
        open_tracker("mlflow", tmp_path / "run", run_root=tmp_path, run_name="r", required=True,
                     uri=f"http://127.0.0.1:{closed_port()}")


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


def test_leaving_without_close_ends_at_once(tmp_path: Path) -> None:
    code = ("import sys, time; from pathlib import Path; from dreambooth.tracking.tracker import open_tracker;"
            "r = Path(sys.argv[1]); t = open_tracker('mlflow', r / 'a', run_root=r, run_name='r', uri=sys.argv[2]);"
            "t.log_metrics(1, {'loss': 1.0}); time.sleep(4)")
    with listening(None) as (port, _):
        args = [sys.executable, "-c", code, str(tmp_path), f"http://127.0.0.1:{port}"]
        done = subprocess.run(args, timeout=30, capture_output=True, text=True, check=False)
    assert done.returncode == 0
