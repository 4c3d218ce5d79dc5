"""Sends a journal to MLflow from a thread of its own, and remembers in `mlflow.json` how far it got."""

import contextlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dreambooth.tracking import mlflow_flavor, mlflow_media
from dreambooth.tracking.journal import EXPERIMENT, parcels, read, starts_line
from dreambooth.tracking.mlflow_auth import REFUSES, refuses, status
from dreambooth.utils.provenance import clean

WAKE = 2.0  # seconds between two looks at the journal
BACKOFF = (5.0, 60.0)  # seconds to the next attempt after a failure: the first, doubling up to the last
TRIES = 5  # an entry that fails this often while the server answers is passed over
CLOSE_LOCAL, CLOSE_REMOTE = 60.0, 15.0  # seconds that close() waits for the rest to be sent
ENVIRONMENT = {  # MLflow's own defaults wait minutes for a dead server; what the user has set wins
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
KINDS = ("image", "artifact", "input", "status")  # of entries that are sent alone
Warn = Callable[[str], None]
log_warning: Warn = logging.getLogger(__name__).warning


class Shipper(threading.Thread):
    """Sends the journal to one MLflow run; nothing here runs in the caller's thread but finish, stop, waiting, url."""

    def __init__(self, journal: Path, uri: str, experiment: str, run_name: str, root: Path | None, warn: Warn) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._journal, self._uri, self._experiment, self._run_name = journal, uri, experiment, run_name
        self._root, self._warn, self.shown = root, warn, clean(uri, uri)
        self.attempted, self._wake = threading.Event(), threading.Event()
        self.outage: str | None = None  # what the server did instead of taking the run, the last time that it did not
        self._stopped = self._closing = self._down = False
        self._failures = self._tries = 0
        self._client: Any = None
        self._images: set[str] | None = None  # names at the server; None: not asked yet
        self._state_file = journal.with_name("mlflow.json")
        self._state: dict[str, Any] = {"run_id": None, "experiment_id": None, "offset": 0, "token": uuid.uuid4().hex}
        with contextlib.suppress(OSError, ValueError):
            self._state |= json.loads(self._state_file.read_text())
        if not starts_line(journal, self._state["offset"]):
            self._state["offset"] = 0  # another journal, or one that lost its end with the power: send it all again
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it tells of every retry

    def run(self) -> None:
        while not self._stopped:
            closing = self._closing  # read first: what close() journalled is then part of this turn
            delivered = self._turn()
            self.attempted.set()
            if closing and (delivered or (self._down and self._failures > 1)):
                return
            self._wake.wait(WAKE if delivered or closing else min(BACKOFF[0] * 2 ** (self._failures - 1), BACKOFF[1]))
            self._wake.clear()

    def finish(self) -> None:
        """One more turn, at once, however long the thread meant to sleep; several if entries fail one by one."""
        self._closing = True
        self.stop(CLOSE_LOCAL if self._uri.startswith(("sqlite:", "file:", "/")) else CLOSE_REMOTE, now=False)
        self._stopped = True

    def stop(self, timeout: float, now: bool = True) -> None:
        self._stopped = now
        self._wake.set()
        self.join(timeout)

    def waiting(self) -> int:
        return sum(1 for _ in read(self._journal, self._state["offset"]))

    def url(self) -> str | None:
        if self._state["run_id"] is None or not self._uri.startswith("http"):
            return None
        return f"{self.shown.rstrip('/')}/#/experiments/{self._state['experiment_id']}/runs/{self._state['run_id']}"

    def _turn(self) -> bool:
        try:
            if self._client is None:
                self._connect()
            for parcel, after in parcels(read(self._journal, self._state["offset"])):
                if self._stopped:
                    return False
                self._send(parcel)
                self._save(offset=after)
                self._tries = 0
        except Exception as error:
            self._failed(error)
            return False
        if self._failures and not self._stopped:
            self._warn(f"MLflow at {self.shown} is back and has everything")
        self._failures, self._down = 0, False
        return True

    def _failed(self, error: Exception) -> None:
        refused = refuses(error)
        answers = not refused and self._alive()
        self._failures += 1
        self._tries = self._tries + 1 if answers else 0
        did = "fails" if answers else REFUSES if refused else "does not answer"
        self._down, told = not answers, f"{did} ({self._reason(error)})"
        if not answers:
            self._client, self.outage = None, told
        if self._failures == 1 and not self._stopped:
            self._warn(f"MLflow at {self.shown} {told}; the run goes on, {self._journal.name} keeps everything and is "
                       f"sent when it {'takes this user' if refused else 'is back'}")

    def _connect(self) -> None:
        from mlflow import MlflowClient

        with _creating(self._uri):  # two runs that start at once would both create the tables
            client = MlflowClient(self._uri)
        self._save(uri=self.shown)  # token and server first: by them a run is found whose creation was not answered
        token, experiment = self._state["token"], self._experiment_id(client)
        found = client.search_runs([experiment], f"tags.`dreambooth.token` = '{token}'", max_results=1)
        if not found:
            first = next((entry["time"] for entry, _ in read(self._journal)), time.time_ns() // 1_000_000)
            found.append(client.create_run(experiment, first, {"dreambooth.token": token}, self._run_name))
        run_id, self._images = found[0].info.run_id, None
        offset = self._state["offset"] if run_id == self._state["run_id"] else 0
        self._save(run_id=run_id, experiment_id=experiment, offset=offset)
        self._client = client

    def _experiment_id(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        root = self._root or (_database(self._uri).parent / "mlartifacts" if self._uri.startswith("sqlite:") else None)
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            with contextlib.suppress(MlflowException):  # another run has just made it
                return str(client.create_experiment(self._experiment, root and root.resolve().as_uri()))
            found = client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id)

    def _send(self, parcel: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        entry = parcel[0]
        if "metrics" in entry:
            self._batch("metrics", [Metric(key, value, e["time"], e["step"]) for e in parcel
                                    for key, value in e["metrics"].items()])
        elif "params" in entry:
            self._batch("params", [Param(key, value[:6000]) for key, value in entry["params"].items()])
        elif "tags" in entry:
            here = str(self._state["experiment_id"])
            self._batch("tags", [RunTag(k, v.replace(EXPERIMENT, here)[:8000]) for k, v in entry["tags"].items()])
        else:
            try:
                self._single(entry)
            except Exception as error:
                self._pass_over(error, str(next((entry[kind] for kind in KINDS if kind in entry), entry)))

    def _batch(self, kind: str, items: Sequence[Any]) -> None:
        """Everything in one call; halves of it, where the server refuses, until what it refuses is alone."""
        limit = 1000 if kind == "metrics" else 100
        try:
            if len(items) <= limit:
                self._client.log_batch(self._state["run_id"], **{kind: items}, synchronous=True)
                return
        except Exception as error:
            if len(items) <= 1 or not self._is_final(error):
                self._pass_over(error, f"{kind[:-1]} {items[0].key}")
                return
        half = min(len(items) // 2, limit)
        self._batch(kind, items[:half])
        self._batch(kind, items[half:])

    def _single(self, entry: dict[str, Any]) -> None:
        run_id, folder = self._state["run_id"], self._journal.parent
        if "image" in entry:
            if self._images is None:  # ask once what is there, so that none is sent twice
                self._images = mlflow_media.names(self._client, run_id)
            mlflow_media.image(self._client, run_id, entry, folder / entry["image"], self._images)
        elif "artifact" in entry:
            if not (folder / entry["artifact"]).exists():
                raise ValueError("there is no such file")
            mlflow_flavor.log(self._client, run_id, folder / entry["artifact"], entry["folder"] or None)
        elif "input" in entry:
            mlflow_media.dataset(self._client, run_id, entry["input"])
        elif entry.get("status") == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        elif "status" in entry:
            self._client.set_terminated(run_id, entry["status"], entry["time"])

    def _pass_over(self, error: Exception, name: str) -> None:
        if not self._is_final(error):
            raise error
        self._warn(f"MLflow does not take {name} ({self._reason(error)}); it stays in {self._journal.name}")

    def _is_final(self, error: Exception) -> bool:
        """The entry is at fault: it would be refused for ever, or has failed TRIES times, and the server is well."""
        at_fault = 400 <= status(error) < 500 and status(error) not in (401, 403, 408, 409, 429)
        enough = not refuses(error) and (isinstance(error, ValueError | TypeError) or self._tries >= TRIES - 1)
        return (at_fault or enough) and self._alive()

    def _alive(self) -> bool:
        """The server answers for this run, and the run has not been deleted there."""
        try:
            return bool(self._client.get_run(self._state["run_id"]).info.lifecycle_stage == "active")
        except Exception:
            return False

    def _save(self, **changes: Any) -> None:
        self._state |= changes
        if self._stopped:
            return
        with contextlib.suppress(OSError):  # a full disk: the journal says so to the run, sending twice does no harm
            fresh = self._state_file.with_suffix(".json.tmp")
            fresh.write_text(json.dumps(self._state))
            fresh.replace(self._state_file)

    def _reason(self, error: Exception) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        if found := re.search(r"\[Errno -?\d+\] [^\"')>]+", text):
            text = found[0]
        elif "timed out" in text:
            text = "no answer in time"
        return clean(text, self._uri)[:200]


def _database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _creating(uri: str) -> contextlib.AbstractContextManager[Any]:
    if not uri.startswith("sqlite:"):
        return contextlib.nullcontext()
    from filelock import FileLock

    path = _database(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", timeout=120)
