"""The tracker with an MLflow that works: everything arrives once, in one run."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import UserError
from dreambooth.tracking.journal import read
from dreambooth.tracking.mlflow_shipper import Shipper
from dreambooth.tracking.tracker import open_tracker
from tests.tracking.mlflow_servers import drop, images, mlflow_tracker, only_run, picture, points, wait_for

pytestmark = pytest.mark.usefixtures("short_waits")


def test_sqlite_end_to_end(tmp_path: Path, uri: str) -> None:
    root, run, warnings = tmp_path, tmp_path / "run", list[str]()
    tracker = open_tracker("mlflow", run, run_root=root, run_name="r", experiment="e", warn=warnings.append)
    tracker.log_params({"lr": "1e-4", "long": "x" * 7000})
    tracker.set_tags({"git": "abc"})
    for step in range(1, 1301):
        tracker.log_metrics(step, {"loss": 1 / step, "lr": 1.0})
    for step, norm in enumerate((1.0, math.inf, -math.inf, math.nan, 2.0)):
        tracker.log_metrics(step, {"grad_norm": norm})
    tracker.log_image(5, "samples/prompt_0", picture(run / "samples"))
    (run / "result.json").write_text("{}")
    tracker.log_artifact(run / "result.json", "out")
    tracker.close("FINISHED")
    tracker.close("FAILED")
    mlflow_run = only_run(uri)
    assert points(uri, "loss") == [(step, 1 / step) for step in range(1, 1301)]
    assert str(points(uri, "grad_norm")) == "[(0, 1.0), (1, nan), (2, nan), (3, nan), (4, 2.0)]"
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


@pytest.mark.parametrize("content", ["[]", "{", "3", '[["offset", 1]]', '{"token": null}', '{"token": "a\' or \'b"}'])
def test_a_damaged_mlflow_json_gives_a_new_mlflow_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "mlflow.json").write_text(content)
    warnings: list[str] = []
    state = Shipper(tmp_path / "metrics.jsonl", "sqlite:///none.db", "e", "r", None, warnings.append)._state
    assert (state["run_id"], state["offset"], len(state["token"])) == (None, 0, 32)
    assert warnings == [f"{tmp_path / 'mlflow.json'} is damaged: everything is sent to a new MLflow run"]


@pytest.mark.parametrize("offset", ["3", -3, 3.5, True, None, 2, 10**30])
def test_a_damaged_offset_sends_everything_again(offset: object, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "mlflow.json").write_text(json.dumps({"token": "a" * 32, "offset": offset, "run_id": 7}))
    state = Shipper(tmp_path / "metrics.jsonl", "sqlite:///none.db", "e", "r", None, print)._state
    assert (state["run_id"], state["offset"], state["token"]) == (None, 0, "a" * 32)


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
    assert len(warnings) == 2
    assert all(name in text for name, text in zip(("missing.png", "bad\tname"), warnings, strict=True))


def test_a_setting_that_changes_when_a_run_is_extended_becomes_a_tag(tmp_path: Path, uri: str) -> None:
    """MLflow never changes a parameter. The tag has the name of the parameter, and the value of the last start."""
    warnings: list[str] = []
    for steps, tag in (("2", None), ("3", "3"), ("4", "4"), ("2", "2")):
        tracker = mlflow_tracker(tmp_path / "run", uri, warnings)
        tracker.log_params({"train.max_train_steps": steps, "train.seed": "7", "long": "x" * 7000})
        tracker.close("FINISHED")
        data = only_run(uri).data
        assert (data.params["train.max_train_steps"], data.tags.get("train.max_train_steps")) == ("2", tag)
        assert not {"train.seed", "long"} & data.tags.keys()
    assert warnings == []


@pytest.mark.parametrize("deleted_first", [True, False])
def test_a_deleted_experiment_is_named_with_its_remedies(tmp_path: Path, uri: str, deleted_first: bool) -> None:
    """It is deleted before the run begins, or while it runs. Afterwards it is restored, or another one is used."""
    from mlflow import MlflowClient

    warnings: list[str] = []
    client = MlflowClient(uri)
    experiment = client.create_experiment("e")
    if deleted_first:
        client.delete_experiment(experiment)
    tracker = mlflow_tracker(tmp_path / "run", uri, warnings)
    tracker.log_params({"lr": "1"})
    if not deleted_first:
        wait_for(lambda: tracker._shipper.count_unsent() == 0)
        client.delete_experiment(experiment)
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.close("FINISHED")
    remedies = f"type MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {experiment}, or " \
        "tracking.experiment=NAME"
    assert len(warnings) == 2 and all(remedies in text for text in warnings), warnings
    assert "has deleted the experiment e; the run continues" in warnings[0] and "not in MLflow yet" in warnings[1]
    with pytest.raises(UserError, match=r"has deleted the experiment e: type MLFLOW_TRACKING_URI=.* restore"):
        mlflow_tracker(tmp_path / "run", uri, required=True)
    if deleted_first:
        other = open_tracker("mlflow", tmp_path / "run", run_root=tmp_path, run_name="r", experiment="f")
        other.close("FINISHED")
        [run] = client.search_runs([client.get_experiment_by_name("f").experiment_id])
        assert run.data.metrics == {"loss": 1.0}
    else:
        client.restore_experiment(experiment)
        mlflow_tracker(tmp_path / "run", uri).close("FINISHED")
        assert points(uri, "loss") == [(1, 1.0)]


def test_a_run_that_is_deleted_in_mlflow_is_sent_again(tmp_path: Path, uri: str) -> None:
    from mlflow import MlflowClient

    warnings: list[str] = []
    tracker = mlflow_tracker(tmp_path / "run", uri, warnings)
    tracker.log_metrics(1, {"loss": 1.0})
    wait_for(lambda: tracker._shipper.count_unsent() == 0)
    MlflowClient(uri).delete_run(only_run(uri).info.run_id)
    tracker.log_metrics(2, {"loss": 2.0})
    wait_for(lambda: tracker._shipper.count_unsent() == 0)
    tracker.close("FINISHED")
    assert points(uri, "loss") == [(1, 1.0), (2, 2.0)]
    assert "has deleted this run, which is sent again as a new one" in warnings[0]


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


@pytest.mark.slow
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
