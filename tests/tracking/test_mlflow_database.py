"""The SQLite database in a run root: it is where the run root is, and its tables are complete or missing."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from dreambooth.tracking import mlflow_database
from dreambooth.tracking.mlflow_client import remedy
from dreambooth.tracking.mlflow_database import database_file, database_uri, is_local, open_client
from dreambooth.tracking.tracker import open_tracker
from tests.tracking.mlflow_servers import picture

pytestmark = pytest.mark.usefixtures("short_waits")

ODD_NAMES = ("a?b", "a%41b", "a?uri=true", "ü #1&c", "a@b:c")


@pytest.mark.parametrize("name", ["runs", *ODD_NAMES])
def test_the_address_of_a_database_names_its_file(name: str) -> None:
    file = Path("/x", name, "mlflow.db")
    assert database_file(database_uri(file)) == file and is_local(database_uri(file))
    assert database_uri(Path("/x/ü b/mlflow.db")) == "sqlite:////x/ü b/mlflow.db", "as before"


def test_addresses_of_other_stores_have_no_file() -> None:
    assert {database_file(uri) for uri in ("http://h", "sqlite://", "sqlite:///:memory:", "/x",
                                           "sqlite:///file:x?mode=ro&uri=true", "sqlite:mlflow.db",
                                           "sqlite:/tmp/m.db")} == {None}
    assert remedy("sqlite:mlflow.db", None).startswith("make its folder readable")


@pytest.mark.parametrize("name", ["a?b%41", "ü #1"])
def test_a_run_root_of_any_name_contains_its_database_and_artifacts(tmp_path: Path, empty_db: Path, name: str) -> None:
    root = tmp_path / name
    root.mkdir()
    shutil.copy(empty_db, root / "mlflow.db")
    tracker = open_tracker("mlflow", root / "run", run_root=root, run_name="r", required=True)
    tracker.log_image(1, "k", picture(root / "run"))
    tracker.close("FINISHED")
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    assert len(list((root / "mlartifacts").rglob("*.png"))) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def half_made(empty_db: Path, path: Path, age: float = 100, tables: int = 5) -> None:
    """A database in which the process was killed while MLflow created the tables."""
    shutil.copy(empty_db, path)
    with closing(sqlite3.connect(path)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        names = [name for name in names if name not in ("experiments", "sqlite_sequence")]
        for name in names[tables:]:
            database.execute(f"DROP TABLE {name}")
        for name in ("experiments", *names[:tables]):
            database.execute(f"DELETE FROM {name}")
        database.commit()
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.fixture
def copied_tables(empty_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the tables instead of creating them, which takes seconds."""
    monkeypatch.setattr(mlflow_database, "_create", lambda file: shutil.copy(empty_db, file))


@pytest.mark.usefixtures("copied_tables")
@pytest.mark.parametrize("content", ["half", "no bytes", "no file"])
def test_a_half_made_database_is_made_again(tmp_path: Path, empty_db: Path, content: str) -> None:
    file = tmp_path / "mlflow.db"
    if content == "half":
        half_made(empty_db, file)
    elif content == "no bytes":
        file.touch()
        os.utime(file, (0, 0))
    assert open_client(database_uri(file)).create_experiment("e") == "1"


@pytest.mark.parametrize("content", ["half, changed now", "in use", "of another program", "damaged"])
def test_any_other_database_is_left_alone(tmp_path: Path, empty_db: Path, content: str) -> None:
    file = tmp_path / "mlflow.db"
    if content == "half, changed now":
        half_made(empty_db, file, age=0)
    elif content == "in use":
        shutil.copy(empty_db, file)
    elif content == "damaged":
        file.write_bytes(b"no database" * 1000)
    else:
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE invoices (id INTEGER)")
    if content != "half, changed now":
        os.utime(file, (0, 0))
    assert not mlflow_database._needs_tables(file)


@pytest.mark.slow
def test_a_kill_while_the_tables_are_made_harms_no_later_run(tmp_path: Path) -> None:
    code = ("import os, signal, sys; from pathlib import Path; from alembic.runtime.migration import HeadMaintainer;"
            "from dreambooth.tracking.tracker import open_tracker;"
            "HeadMaintainer.update_to_step = lambda *args: os.kill(os.getpid(), signal.SIGKILL);"
            "open_tracker('mlflow', Path(sys.argv[1], 'a'), run_root=Path(sys.argv[1]), run_name='r', required=True)")
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    tracker = open_tracker("mlflow", tmp_path / "b", run_root=tmp_path, run_name="r", required=True)
    tracker.close("FINISHED")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "mlflow.db", "mlflow.db.lock"]
