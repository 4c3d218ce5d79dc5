"""Corrects MLflow's SQLite database after its folder, a run root, was moved or copied.

MLflow stores absolute addresses of artifacts, and has no function to change them. In a run root, artifacts are in the
folder `mlartifacts` beside the database. Without the correction, MLflow would make the old folder anew for the pictures
of later runs, would not find those of earlier runs, and could not load a registered model.
"""

import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dreambooth.utils.plurals import counted

ARTIFACTS = "mlartifacts"  # folder of the artifacts, beside the database
TAGS_WITH_PATHS = ("model", "mlflow.note.content")
# Columns with addresses of artifacts, in addition to those of experiments and runs.
ADDRESSES = (("model_versions", "source"), ("model_versions", "storage_location"),
             ("logged_models", "artifact_location"))

log = logging.getLogger(__name__)


def correct_addresses(file: Path) -> None:
    """Correct the addresses in a database if its folder was moved or copied; log a warning that says so.

    An experiment was moved if its artifacts should be in another folder named `mlartifacts`, but the artifacts of at
    least one of its runs are beside the database. Only addresses of artifacts that are there are changed. The caller
    holds the lock of the database. An error of the database is left to MLflow, which meets it, too.
    """
    here = file.parent.resolve() / ARTIFACTS
    if not (file.is_file() and here.is_dir()):
        return
    with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database, database:
        for experiment, old in _other_locations(database, here):
            runs = [(run, str(uri)) for run, uri in database.execute(
                "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment,))
                if str(uri).startswith(f"{old}/") and (here / str(run)).is_dir()]
            if not runs:
                continue
            database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                             (here.as_uri(), experiment))
            for run, uri in runs:
                database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (_moved(uri, old, here), run))
            _correct_models(database, old, here)
            old_root = _path(old).parent
            _correct_tags(database, [run for run, _ in runs], str(old_root), str(here.parent))
            log.warning("%s was in %s before: %s in MLflow now %s to %s", file, old_root, counted(len(runs), "run"),
                        "refers" if len(runs) == 1 else "refer", here)


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
