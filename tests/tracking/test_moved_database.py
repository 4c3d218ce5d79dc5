"""A run root that was moved or copied: MLflow finds its artifacts, and writes nothing to the old place."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient, artifacts
from mlflow.entities import FileInfo

from dreambooth.errors import UserError
from dreambooth.tracking.mlflow_database import database_uri, open_client
from dreambooth.tracking.mlflow_model import linked_model
from dreambooth.tracking.model_registry import Registry, Version
from dreambooth.tracking.tracker import open_tracker
from tests.tracking.mlflow_servers import picture

pytestmark = pytest.mark.usefixtures("short_waits")
TAGS = {"step": "2"}


def track(root: Path, name: str) -> None:
    tracker = open_tracker("mlflow", root / name, run_root=root, run_name=name, required=True)
    tracker.log_image(1, "k", picture(root / name))
    tracker.set_tags({"model": f"{root}/{name}/model", "mlflow.note.content": f"type run={root}/{name} or {root}-x"})
    tracker.close("FINISHED")


def register(root: Path) -> tuple[Version, str]:
    """Register the model of the run a of a root. Returns its version, and the address from which MLflow loads it."""
    registry = Registry(database_uri(root / "mlflow.db"))
    version = registry.register("toy", find_run(root, "a").info.run_id, root / "a/model", TAGS,
                                lambda: linked_model(root / "a", root / "a/model"))
    return version, registry._client.get_model_version_download_uri("toy", str(version.number))


def find_run(root: Path, name: str) -> Any:
    client = MlflowClient(database_uri(root / "mlflow.db"))
    [run] = [run for run in client.search_runs(["1"]) if run.info.run_name == name]
    return run


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path: Path, empty_db: Path) -> Path:
    """A run root, whose name has characters that an address quotes, with a run and its registered model."""
    root = tmp_path / "old ü"
    (root / "a/model/unet").mkdir(parents=True)
    (root / "a/model/unet/weights").write_bytes(b"weights")
    shutil.copy(empty_db, root / "mlflow.db")
    track(root, "a")
    register(root)
    return root


@pytest.mark.parametrize("copied", [False, True], ids=["moved", "copied"])
def test_a_moved_run_root_keeps_its_artifacts_and_writes_to_itself(root: Path, copied: bool,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    new = root.with_name("new #1")
    (shutil.copytree if copied else shutil.move)(root, new)
    before = files(root)
    with caplog.at_level(logging.WARNING):
        track(new, "b")
    assert files(root) == before, "nothing is written to the old place"
    assert f"mlflow.db was in {root} before: 1 run in MLflow now refers to {new}/mlartifacts" in caplog.text
    run = find_run(new, "a")
    assert run.data.tags["model"] == f"{new}/a/model"
    assert run.data.tags["mlflow.note.content"] == f"type run={new}/a or {root}-x"
    client = MlflowClient(database_uri(new / "mlflow.db"))
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    version, address = register(new)
    assert (version.number, address.startswith(f"{(new / 'mlartifacts').as_uri()}/")) == (1, True)
    caplog.clear()
    open_client(database_uri(new / "mlflow.db"))
    assert not caplog.text, "once"
    if copied:
        assert find_run(root, "a").data.tags["model"] == f"{root}/a/model", "the original does not change"


def test_a_run_that_was_killed_before_its_first_artifact_moves_with_the_others(root: Path) -> None:
    client = MlflowClient(database_uri(root / "mlflow.db"))
    killed, kept = (client.create_run("1").info.run_id for _ in range(2))
    new = root.with_name("new")
    shutil.copytree(root, new)
    (root / "mlartifacts" / kept).mkdir()  # by the original run, after the copy
    moved = open_client(database_uri(new / "mlflow.db"))
    assert moved.get_run(killed).info.artifact_uri == f"{(new / 'mlartifacts').as_uri()}/{killed}/artifacts"
    assert moved.get_run(kept).info.artifact_uri == f"{(root / 'mlartifacts').as_uri()}/{kept}/artifacts"


def test_an_experiment_whose_artifacts_are_elsewhere_on_purpose_keeps_its_address(root: Path) -> None:
    client = MlflowClient(database_uri(root / "mlflow.db"))
    location = (root.parent / "large disk/mlartifacts").as_uri()
    experiment = client.create_experiment("own", location)
    client.create_run(experiment)
    assert open_client(database_uri(root / "mlflow.db")).get_experiment(experiment).artifact_location == location


def test_a_registered_model_that_mlflow_has_lost_is_copied_again(root: Path) -> None:
    shutil.rmtree(root / "mlartifacts")
    version, address = register(root)
    assert version.number == 1
    assert Path(address.removeprefix("file://").replace("%20", " ").replace("%C3%BC", "ü"), "unet/weights").is_file()


def test_a_model_that_mlflow_cannot_load_is_not_registered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(root / "mlartifacts")
    monkeypatch.setattr(MlflowClient, "log_artifacts", lambda *arguments: None)
    with pytest.raises(UserError, match=r"version 1 of toy cannot be loaded .*lacks its unet/weights: check"):
        register(root)


def test_a_store_that_tells_no_sizes_of_its_files_is_not_taken_for_one_that_has_lost_them(
        root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_sizes(*arguments: Any, **options: Any) -> list[FileInfo]:
        return [FileInfo(file.path, file.is_dir, None) for file in list_artifacts(*arguments, **options)]

    list_artifacts = artifacts.list_artifacts
    monkeypatch.setattr(artifacts, "list_artifacts", without_sizes)
    monkeypatch.setattr(MlflowClient, "log_artifacts", lambda *arguments: pytest.fail("copied again"))
    assert register(root)[0].number == 1
