"""Corrects MLflow's SQLite database after its folder, a run root, was moved or copied.

MLflow stores absolute addresses of artifacts, and has no function to change them. In a run root, artifacts are in the
folder `mlartifacts` beside the database. Without the correction, MLflow would make the old folder anew for the pictures
of later runs, would not find those of earlier runs, and could not load a registered model.
"""

import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dreambooth.utils.plurals import counted

ARTIFACTS = "mlartifacts"  # folder of the artifacts, beside the database
TAGS_WITH_PATHS = ("model", "mlflow.note.content")
# Columns with addresses of artifacts, in addition to those of experiments and runs.
ADDRESSES = (("model_versions", "source"), ("model_versions", "storage_location"),
             ("logged_models", "artifact_location"))
BUSY_TIMEOUT = 5000  # milliseconds to wait while another program has locked the database

log = logging.getLogger(__name__)


def correct_addresses(file: Path, database: sqlite3.Connection) -> None:
    """Correct the addresses in a database if its folder was moved or copied; log a warning that says so.

    An experiment was moved if its artifacts should be in another folder named `mlartifacts`, but the artifacts of at
    least one of its runs are beside the database. Only addresses of artifacts that are there, or that are nowhere, are
    changed. The caller holds the lock of the database. An error of the database is left to MLflow, which meets it, too.

    Args:
        database: a connection to `file`.
    """
    here = file.parent.resolve() / ARTIFACTS
    if not here.is_dir():
        return
    with suppress(sqlite3.Error):
        database.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
        with database:
            moved = [(old, _correct_experiment(database, experiment, old, here))
                     for experiment, old in _other_locations(database, here)]
        for old, number in [(old, number) for old, number in moved if number]:
            log.warning("%s was in %s before: %s in MLflow now %s to %s", file, _path(old).parent,
                        counted(number, "run"), "refers" if number == 1 else "refer", here)


def _correct_experiment(database: sqlite3.Connection, experiment: int, old: str, here: Path) -> int:
    """Correct the addresses of an experiment if it was moved. Return the number of corrected runs.

    A run without artifacts here belongs to the moved experiment, too, if it has none in the old folder: it may have
    been killed before its first one.
    """
    runs = {str(run): str(uri) for run, uri in database.execute(
        "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment,))
        if str(uri).startswith(f"{old}/")}
    present = {run for run in runs if (here / run).is_dir()}
    if not present:
        return 0
    moved = [run for run in runs if run in present or not _exists(_path(old) / run)]
    database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                     (here.as_uri(), experiment))
    for run in moved:
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (_moved(runs[run], old, here), run))
    _correct_models(database, old, here)
    _correct_tags(database, moved, str(_path(old).parent), str(here.parent))
    return len(moved)


def _exists(path: Path) -> bool:
    """Return whether a path exists. The private folder of another user counts as missing."""
    with suppress(OSError):
        return path.exists()
    return False


def _other_locations(database: sqlite3.Connection, here: Path) -> Iterator[tuple[int, str]]:
    """Yield experiments whose artifacts belong to a folder `mlartifacts` other than `here`: ID and address."""
    for experiment, location in database.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall():
        old = str(location).rstrip("/")
        folder = _path(old)
        moved = folder != here
        with suppress(OSError):  # it is gone, or a private folder of another user
            moved = moved and not folder.samefile(here)
        if moved and old.startswith("file:") and folder.name == ARTIFACTS:
            yield experiment, old


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))


def _moved(uri: str, old: str, here: Path) -> str:
    return here.as_uri() + uri.removeprefix(old)


def _correct_models(database: sqlite3.Connection, old: str, here: Path) -> None:
    for table, column in ADDRESSES:
        with suppress(sqlite3.OperationalError):  # another version of MLflow may not have this column
            for row, uri in database.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
                if str(uri).startswith(f"{old}/") and _path(moved := _moved(uri, old, here)).exists():
                    database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (moved, row))


def _correct_tags(database: sqlite3.Connection, runs: list[str], old_root: str, root: str) -> None:
    """Replace the path of the old run root in the tags of `runs` that name files or commands."""
    path = re.compile(re.escape(old_root) + r"(?![\w.-])")
    for run in runs:
        for key in TAGS_WITH_PATHS:
            where = (run, key)
            for (value,) in database.execute("SELECT value FROM tags WHERE run_uuid = ? AND key = ?", where).fetchall():
                database.execute("UPDATE tags SET value = ? WHERE run_uuid = ? AND key = ?",
                                 (path.sub(lambda _: root, str(value)), *where))
