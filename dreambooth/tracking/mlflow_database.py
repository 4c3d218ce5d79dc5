"""MLflow's SQLite database in a run root: its address, its lock, and the atomic creation of its tables."""

import contextlib
import errno
import glob
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dreambooth.utils import atomic_files, file_lock, permissions

SQLITE = ("sqlite:", "sqlite+")  # beginnings of the address of a SQLite database
LOCK_TIMEOUT = 120.0  # seconds to wait while another process opens or creates the database
UNCHANGED = 4.0  # seconds without a change or lock of a file, after which no other program is creating its tables
_BOOKKEEPING = {"alembic_version", "sqlite_sequence", "workspaces"}  # tables with rows before MLflow is first used


def database_uri(file: Path) -> str:
    """Return the address of the SQLite database `file` for MLflow and SQLAlchemy. Special characters are quoted."""
    if not set("?%") & set(str(file)):  # nothing to quote, so that the start of a run does not import SQLAlchemy
        return f"sqlite:///{file}"
    from sqlalchemy.engine import URL

    # MLflow creates the parent folder of sqlite:///FILE, but with the quoted name. With a driver, it does not.
    return URL.create("sqlite+pysqlite", database=str(file)).render_as_string()


def database_file(uri: str) -> Path | None:
    """Return the file of a SQLite database.

    Return None for a server, a database in memory, an address with `?uri=true`, or an address that is not valid, which
    MLflow reports.
    """
    if not uri.startswith(SQLITE):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    return Path(url.database) if url.database and url.database != ":memory:" and "uri" not in url.query else None


def is_local(uri: str) -> bool:
    """Return whether an address of MLflow names a database or a folder on this machine, not a server.

    An ARN that ends in mlflow-tracking-server/NAME or mlflow-app/ID names a server, which SageMaker manages.
    """
    return uri.startswith((*SQLITE, "file:", "/")) or (":" not in uri and uri != "databricks")


def local_path(uri: str) -> Path | None:
    """Return the local file or folder that an address of MLflow names; None for a server or a database in memory."""
    if not is_local(uri):
        return None
    if uri.startswith(SQLITE):
        return database_file(uri)
    return Path(unquote(urlsplit(uri).path) if uri.startswith("file:") else uri)


def open_client(uri: str) -> Any:
    """Return an MLflow client.

    If the tables of a SQLite database are missing or incomplete, create them first. If the folder of the database was
    moved or copied, correct the addresses in it.

    Raises:
        PermissionError: this user may not write to a SQLite database, or to its folder, where SQLite adds files.
    """
    file = database_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        changed = (file.parent, file, Path(f"{file}.lock"), file.parent / "mlartifacts")
        if path := permissions.first_unwritable(changed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    from mlflow import MlflowClient

    if uri.startswith("arn:"):  # sagemaker-mlflow signs requests for MLflow's global address, not for the client's
        from mlflow import set_tracking_uri

        set_tracking_uri(uri)
    if file is None:
        return MlflowClient(uri)
    with file_lock.hold(Path(f"{file}.lock"), LOCK_TIMEOUT):  # otherwise two simultaneous runs would create the tables
        if _needs_tables(file):
            _create(file)
        return MlflowClient(uri)


def _needs_tables(file: Path) -> bool:
    """Return whether the tables of a database have to be created. If not, correct the addresses in it."""
    import sqlite3

    from dreambooth.tracking.moved_database import correct_addresses

    if not file.exists():
        return True
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(file, timeout=0)) as database:
        if _is_unfinished(file, database):
            return True
        correct_addresses(file, database)
    return False


def _create(file: Path) -> None:
    """Create MLflow's database under a temporary name, and then rename it to `file`.

    `file` must be missing or unfinished (`_is_unfinished`). The temporary name is used because MLflow creates its
    tables in many steps, which take seconds. If a kill or a full disk stops MLflow between two steps, MLflow can never
    complete the tables.
    """
    from mlflow import MlflowClient

    for leftover in file.parent.glob(f"{atomic_files.TEMPORARY_PREFIX}*-{glob.escape(file.name)}*"):
        leftover.unlink()
    with atomic_files.write_file(file) as temporary:
        MlflowClient(database_uri(temporary))
        for suffix in ("", "-journal", "-wal", "-shm"):  # SQLite would apply an old journal to the new database
            Path(f"{file}{suffix}").unlink(missing_ok=True)


def _is_unfinished(file: Path, database: Any) -> bool:
    """Return whether a database file has no data because the creation of its tables was interrupted.

    Return False if another program may be creating the tables now: if it has locked the file, or if the file has
    changed within the last UNCHANGED seconds. One such program is `mlflow ui`, which does not use our lock. Return
    False, too, if the file has only tables that are not MLflow's.

    Args:
        database: a connection to `file` that does not wait for locks.
    """
    import sqlite3

    if time.time() - file.stat().st_mtime < UNCHANGED:
        return False
    try:
        database.execute("BEGIN IMMEDIATE")
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return (not tables or "experiments" in tables) and not any(
            database.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in tables - _BOOKKEEPING)
    except sqlite3.Error:
        return False
    finally:
        database.rollback()
