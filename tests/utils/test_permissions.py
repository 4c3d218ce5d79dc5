"""Files and folders that refuse this user: one message with path, owner and command, and nothing is lost."""

import importlib
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from dreambooth import cli
from dreambooth.errors import UserError
from dreambooth.runs import checkpoint_files
from dreambooth.runs.run_folder import locked, read_result
from dreambooth.storage import manifest
from dreambooth.sweeps.trials import find_trials
from dreambooth.tracking.mlflow_database import open_client
from dreambooth.tracking.moved_database import _other_locations
from dreambooth.tracking.tracker import open_tracker
from dreambooth.utils import atomic_files
from dreambooth.utils.image_grid import is_intact_png
from tests.tracking.mlflow_servers import wait_for

NOBODY = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in which the test, if root starts it, goes on as another user from the call of `change_user` on."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner may open
        Path(folder).chmod(0o755)
        try:
            yield Path(folder)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            for path in (Path(folder), *Path(folder).rglob("*/")):
                path.chmod(0o755)


def change_user() -> None:
    if os.getuid() == 0:
        os.seteuid(NOBODY)


def write(path: Path, mode: int = 0o000, content: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)


def checkpoint(folder: Path) -> object:
    with manifest.write_folder(folder / "step-000002") as temporary:
        write(temporary / "trained.safetensors", 0o644)
    (folder / "step-000002/trained.safetensors").chmod(0)
    return lambda: checkpoint_files.latest(folder)


def result(folder: Path) -> object:
    write(folder / "result.json")
    return lambda: read_result(folder)


def picture(folder: Path) -> object:
    Image.new("RGB", (8, 8)).save(folder / "00000.png")
    (folder / "00000.png").chmod(0)
    return lambda: is_intact_png(folder / "00000.png")


@pytest.mark.parametrize("prepare", [checkpoint, result, picture])
def test_an_unreadable_file_is_not_taken_for_a_damaged_one(
        prepare: Callable[[Path], Callable[[], object]], shared: Path) -> None:
    """A damaged checkpoint, model or picture is made again, and replaces what another user has made."""
    read = prepare(shared)
    change_user()
    with pytest.raises(PermissionError) as error:
        read()
    sentence = cli.describe_system_error(error.value) or ""
    assert f"it belongs to {shared.owner()} and group {shared.group()}, mode 0000): type another path, or chmod -R " \
        in sentence


@pytest.mark.parametrize(("target", "blamed"), [("gone", "folder"), ("private/photo", "folder/private")])
def test_a_link_into_a_folder_that_refuses_this_user_is_a_message_without_traceback(
        target: str, blamed: str, shared: Path) -> None:
    (shared / "my folder/private").mkdir(parents=True)
    (shared / "my folder/private").chmod(0)
    (shared / "my folder").chmod(0o555)
    (shared / "link").symlink_to(shared / "my folder" / target)
    change_user()
    with pytest.raises(PermissionError) as error:
        (shared / "link").write_text("")
    sentence = cli.describe_system_error(error.value) or ""
    assert f"/my {blamed} belongs to {shared.owner()}" in sentence
    assert f'+rwX "{shared.resolve()}/my {blamed}"' in sentence, "ready to paste into a shell"


def test_a_run_with_a_folder_of_another_user_is_refused_before_training(shared: Path) -> None:
    """The folder could be renamed but not emptied, after training and without the former model."""
    (shared / "run/model/unet").mkdir(parents=True)
    (shared / "run/model/unet").chmod(0o555)
    for folder in ("run", "run/model"):
        (shared / folder).chmod(0o777)
    change_user()
    with pytest.raises(UserError, match=r"run/model/unet belongs to .*, mode 0555\): type chmod -R .* .*/run"), \
            locked(shared / "run"):
        pass


def test_the_folders_of_a_run_are_listed_by_the_holder_of_its_lock_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder may remove a checkpoint while another process lists it."""
    def remove_meanwhile(folder: Path, pattern: str) -> Iterator[Path]:
        raise FileNotFoundError(folder)

    with locked(tmp_path), monkeypatch.context() as patch:
        patch.setattr(Path, "rglob", remove_meanwhile)
        with pytest.raises(UserError, match="another process is training in"), locked(tmp_path):
            pass


def test_leftovers_of_another_user_in_a_shared_folder_stop_nothing(shared: Path) -> None:
    write(shared / ".writing-1-00000.png")
    shared.chmod(0o555)
    os.utime(shared / ".writing-1-00000.png", (0, 0))
    change_user()
    atomic_files.remove_leftovers(shared, atomic_files.SHARED_LEFTOVER_AGE)
    assert (shared / ".writing-1-00000.png").exists()


def test_runs_that_cannot_be_read_are_named(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of them may be the best trial of the sweep."""
    write(shared / "a/metrics.jsonl")
    write(shared / "b/metrics.jsonl", 0o644)
    change_user()
    assert find_trials(shared, "s") == []
    assert f"1 run cannot be read by this user and will be left out ({shared}/a/metrics.jsonl belongs to" in caplog.text


@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db.lock", "mlartifacts", "."])
def test_a_database_of_another_user_is_a_message_without_traceback(
        name: str, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shared.chmod(0o777)
    if name.startswith("mlflow"):
        write(shared / name, 0o444)
    else:
        (shared / name).mkdir(exist_ok=True)
        (shared / name).chmod(0o555)
    importlib.import_module("sqlalchemy.engine")  # another user may not read the libraries of root's Python
    path = (shared / name).resolve()
    (shared / "run").mkdir()
    (shared / "run").chmod(0o777)
    warnings: list[str] = []
    change_user()
    with pytest.raises(PermissionError):
        open_client(f"sqlite:///{shared}/mlflow.db")
    tracker = open_tracker("mlflow", shared / "run", run_root=shared, run_name="r", warn=warnings.append)
    tracker.log_metrics(1, {"loss": 1.0})
    wait_for(lambda: bool(warnings))
    tracker.close("FINISHED")
    assert "Traceback" not in capfd.readouterr().err
    assert f"refuses this user ({path} belongs to" in warnings[0] and ": type chmod -R " in warnings[0]
    assert "start the server" not in warnings[0] and "accepts this user" in warnings[1]


def test_a_root_copied_out_of_a_private_folder_is_corrected_too(shared: Path) -> None:
    old, here = shared / "private/runs/mlartifacts", shared / "runs/mlartifacts"
    old.mkdir(parents=True)
    here.mkdir(parents=True)
    (shared / "private").chmod(0)
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE experiments (experiment_id, artifact_location)")
        database.execute("INSERT INTO experiments VALUES (1, ?)", (f"file://{old}",))
        change_user()
        assert list(_other_locations(database, here)) == [(1, f"file://{old}")]
