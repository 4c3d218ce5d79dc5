"""Background thread that sends a journal to MLflow and records the offset of the next unsent entry in `mlflow.json`."""

import contextlib
import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dreambooth.tracking import mlflow_logging
from dreambooth.tracking.journal import EXPERIMENT, batches, is_line_start, read
from dreambooth.tracking.mlflow_client import (
    REFUSES_USER,
    DeletedExperimentError,
    check_answers,
    http_status,
    is_refusal,
    remedy,
    set_default_environment,
)
from dreambooth.tracking.mlflow_database import database_file, is_local, open_client
from dreambooth.utils import atomic_files, permissions
from dreambooth.utils.masking import mask_urls

POLL_INTERVAL = 2.0  # seconds between two reads of the journal
BACKOFF = (5.0, 60.0)  # seconds before a failed attempt is repeated: initial and maximum pause; doubled each time
MAX_ATTEMPTS = 5  # an entry is skipped after this number of failures while the server answers
# Seconds that close() waits for the remaining entries to be sent: to a file, to a server, to a server that is down.
CLOSE_LOCAL, CLOSE_REMOTE, CLOSE_DOWN = 60.0, 15.0, 4.0
SENT_ALONE = ("image", "artifact", "input", "status")  # kinds of entries of which each call sends one
Warn = Callable[[str], None]
log_warning: Warn = logging.getLogger(__name__).warning


class Shipper(threading.Thread):
    """Thread that sends a journal to one MLflow run. Other threads call only finish, stop, count_unsent and url.

    Args:
        artifact_root: folder for the artifacts of a new experiment. None: the folder mlartifacts beside the database if
            `uri` is a SQLite database, and otherwise the default of the server.
        announce_outages: whether to warn when the server stops answering. If False, the caller reads the attribute
            `outage` instead.
        experiment_key: the configuration key that names the experiment, for messages.
    """

    def __init__(self, journal: Path, uri: str, experiment: str, run_name: str, artifact_root: Path | None,
                 warn: Warn, announce_outages: bool = True, experiment_key: str = "tracking.experiment") -> None:
        super().__init__(name="mlflow", daemon=True)
        self._experiment_key = experiment_key
        self._journal, self._uri, self._experiment, self._run_name = journal, uri, experiment, run_name
        self._artifact_root, self._warn, self.display_uri = artifact_root, warn, mask_urls(uri, uri)
        self.attempted, self._wake = threading.Event(), threading.Event()
        self._announce_outages, self._announced = announce_outages, False
        self.outage: str | None = None  # why the server is down, such as "does not answer (...)"; None: it is not
        self.error: Exception | None = None  # the reason of the outage; None: there is none
        self._stopped = self._closing = self._down = False
        self._failures = self._attempts = 0  # consecutive failed rounds; failed attempts to send the next entry
        self._client: Any = None
        self._images: set[str] | None = None  # names of the images in MLflow; None: not listed yet
        self._state_file = journal.with_name("mlflow.json")
        self._state: dict[str, Any] = {"run_id": None, "experiment_id": None, "offset": 0, "token": uuid.uuid4().hex}
        self._state |= self._read_state()
        if not is_line_start(journal, self._state["offset"]):
            self._state["offset"] = 0  # not the same journal, or its end was lost: send all entries again
        set_default_environment()
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # urllib3 warns of every retry

    def _read_state(self) -> dict[str, Any]:
        """Return the valid values in mlflow.json, or {} if the file has no valid token.

        The token identifies the MLflow run of the journal. Without a token, the journal is sent to a new MLflow run.
        """
        saved = atomic_files.read_object(self._state_file) or {}
        valid = {"run_id": str, "experiment_id": str, "offset": int, "token": str, "uri": str}
        state = {key: value for key, value in saved.items() if type(value) is valid.get(key)}
        if not re.fullmatch("[0-9a-f]{32}", str(state.get("token"))):
            if self._state_file.is_file():
                self._warn(f"{self._state_file} is damaged: everything is sent to a new MLflow run")
            return {}
        return state

    def run(self) -> None:
        while not self._stopped:
            closing = self._closing  # read first, so that this round includes what close() wrote to the journal
            delivered = self._send_new_entries()
            self.attempted.set()
            if closing and (delivered or (self._down and self._failures > 1)):
                return
            self._wake.wait(POLL_INTERVAL if delivered or closing else
                            min(BACKOFF[0] * 2 ** (self._failures - 1), BACKOFF[1]))
            self._wake.clear()

    def finish(self) -> None:
        """Send the remaining entries now and end the thread.

        Wait at most CLOSE_LOCAL seconds for a local database or folder, and at most CLOSE_REMOTE seconds for a server.
        If MLflow did not answer the last attempt to send entries, wait at most CLOSE_DOWN seconds for an answer.
        """
        self._closing = True
        limit = CLOSE_LOCAL if is_local(self._uri) else CLOSE_REMOTE
        first = min(limit, CLOSE_DOWN) if self._down else limit
        self.stop(first, now=False)
        if not self._down:
            self.join(limit - first)
        self._stopped = True

    def stop(self, timeout: float, now: bool = True) -> None:
        """Wake the thread, and wait at most `timeout` seconds until the thread has ended.

        Args:
            now: whether the thread ends without sending the remaining entries.
        """
        self._stopped = now
        self._wake.set()
        self.join(timeout)

    def count_unsent(self) -> int:
        """Return the number of journal entries that MLflow does not have yet."""
        return sum(1 for _ in read(self._journal, self._state["offset"]))

    def url(self) -> str | None:
        """Return the address of the run's page on the MLflow server; None if there is no server or no run yet."""
        if self._state["run_id"] is None or not self._uri.startswith("http"):
            return None
        return (f"{self.display_uri.rstrip('/')}/#/experiments/{self._state['experiment_id']}"
                f"/runs/{self._state['run_id']}")

    def _send_new_entries(self) -> bool:
        """Send the journal entries after the offset in `mlflow.json`. Return True if MLflow now has all entries."""
        try:
            if self._client is None:
                self._connect()
            for batch, offset in batches(read(self._journal, self._state["offset"])):
                if self._stopped:
                    return False
                self._send(batch)
                self._save_state(offset=offset)
                self._attempts = 0
        except Exception as error:
            self._handle_failure(error)
            return False
        if self._announced and not self._stopped:
            self._warn(f"MLflow at {self.display_uri} is back and has received everything")
        self._failures, self._down, self._announced, self.outage, self.error = 0, False, False, None, None
        return True

    def _handle_failure(self, error: Exception) -> None:
        stage = self._lifecycle_stage()
        if stage == "deleted":
            try:
                self._connect()
            except Exception as reason:  # its experiment was deleted, too
                error, stage = reason, None
            else:
                self._warn(f"MLflow at {self.display_uri} has deleted this run, which is sent again as a new one")
                return
        refused = is_refusal(error)
        answers = not refused and stage == "active"
        self._failures += 1
        self._attempts = self._attempts + 1 if answers else 0
        problem = "fails" if answers else REFUSES_USER if refused else "does not answer"
        self._down, description = not answers, f"{problem} ({self._reason(error)})"
        if refused:
            advice = " and is sent when MLflow accepts this user" + (
                f": {remedy(self._uri, error)}" if is_local(self._uri) or self._uri.startswith("arn:") else "")
        elif isinstance(error, DeletedExperimentError):
            description, advice = str(error), f": {error.remedy}"
        else:
            advice = " and is sent when MLflow is back"
        if not answers:
            self._client, self.outage, self.error = None, description, error
        if self._failures == 1 and not self._stopped and (answers or self._announce_outages):
            self._announced = True
            self._warn(f"MLflow at {self.display_uri} {description}; the run continues, and "
                       f"{self._journal.name} keeps everything{advice}")

    def _connect(self) -> None:
        """Create the MLflow client, and find or create the MLflow run of this journal."""
        # The token is saved first. If the server creates the run but the response is lost, a search finds the token.
        self._save_state(uri=self.display_uri)
        check_answers(self._uri)
        self._down = False
        client = open_client(self._uri)
        token, experiment = self._state["token"], self._experiment_id(client)
        found = client.search_runs([experiment], f"tags.`dreambooth.token` = '{token}'", max_results=1)
        if not found:
            start = next((entry["time"] for entry, _ in read(self._journal)), time.time_ns() // 1_000_000)
            found.append(client.create_run(experiment, start, {"dreambooth.token": token}, self._run_name))
        run_id, self._images = found[0].info.run_id, None
        offset = self._state["offset"] if run_id == self._state["run_id"] else 0
        self._save_state(run_id=run_id, experiment_id=experiment, offset=offset)
        self._client = client

    def _experiment_id(self, client: Any) -> str:
        """Return the ID of the MLflow experiment. Create the experiment if it does not exist.

        Raises:
            DeletedExperimentError: the experiment has been deleted.
        """
        from mlflow.exceptions import MlflowException

        file = database_file(self._uri)
        root = self._artifact_root or (file and file.parent / "mlartifacts")
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            with contextlib.suppress(MlflowException):  # another run has just created the experiment
                return str(client.create_experiment(self._experiment, root and root.resolve().as_uri()))
            found = client.get_experiment_by_name(self._experiment)
        if found.lifecycle_stage == "deleted":
            raise DeletedExperimentError(self._experiment, found.experiment_id, self._uri, self._experiment_key)
        return str(found.experiment_id)

    def _send(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        entry = batch[0]
        if "metrics" in entry:
            # MLflow stores infinity as 1.8e308, which flattens a chart; nan is a gap in it.
            self._log_batch("metrics", [
                Metric(key, math.nan if math.isinf(value) else value, e["time"], e["step"])
                for e in batch for key, value in e["metrics"].items()])
        elif "params" in entry:
            values = {key: value[:6000] for key, value in entry["params"].items()}
            changed = self._changed_params(values)
            self._log_batch("params", [Param(key, value) for key, value in values.items() if key not in changed])
            self._log_batch("tags", [RunTag(key, values[key]) for key in changed])
        elif "tags" in entry:
            experiment = str(self._state["experiment_id"])
            self._log_batch("tags", [RunTag(k, v.replace(EXPERIMENT, experiment)[:8000])
                                     for k, v in entry["tags"].items()])
        else:
            try:
                self._send_alone(entry)
            except Exception as error:
                self._skip_or_raise(error, str(next((entry[kind] for kind in SENT_ALONE if kind in entry), entry)))

    def _changed_params(self, values: dict[str, str]) -> set[str]:
        """Return the parameters that MLflow already has with another value, or has had since a run was extended.

        MLflow never changes a parameter. A tag of the same name holds the value of the last start.
        """
        data = self._client.get_run(self._state["run_id"]).data
        return {key for key, value in values.items() if key in data.params and (
            key in data.tags or data.params[key] != value)}

    def _log_batch(self, kind: str, items: Sequence[Any]) -> None:
        """Log all items in one call. If the server rejects the call, log each half in its own call.

        Halving is repeated, so that in the end only the items that the server does not accept are missing.
        """
        limit = 1000 if kind == "metrics" else 100
        try:
            if not items:
                return
            if len(items) <= limit:
                self._client.log_batch(self._state["run_id"], **{kind: items}, synchronous=True)
                return
        except Exception as error:
            if len(items) <= 1 or not self._is_permanent(error):
                self._skip_or_raise(error, f"{kind[:-1]} {items[0].key}")
                return
        half = min(len(items) // 2, limit)
        self._log_batch(kind, items[:half])
        self._log_batch(kind, items[half:])

    def _send_alone(self, entry: dict[str, Any]) -> None:
        """Send an entry of one of the kinds SENT_ALONE: an image, artifact, dataset or status."""
        run_id, folder = self._state["run_id"], self._journal.parent
        if "image" in entry:
            if self._images is None:  # listed once per connection, so that no image is sent twice
                self._images = mlflow_logging.list_image_names(self._client, run_id)
            mlflow_logging.log_image(self._client, run_id, entry, folder / entry["image"], self._images)
        elif "artifact" in entry:
            mlflow_logging.log_artifact(self._client, run_id, folder / entry["artifact"], entry["folder"] or None)
        elif "input" in entry:
            mlflow_logging.log_dataset(self._client, run_id, entry["input"])
        elif entry.get("status") == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        elif "status" in entry:
            self._client.set_terminated(run_id, entry["status"], entry["time"])

    def _skip_or_raise(self, error: Exception, name: str) -> None:
        if not self._is_permanent(error):
            raise error
        self._warn(f"MLflow does not accept {name} ({self._reason(error)}); it stays in {self._journal.name}")

    def _is_permanent(self, error: Exception) -> bool:
        """Return whether to skip an entry that could not be sent because of `error`.

        Skip the entry if the server works, but rejects the entry as invalid or has failed to receive it MAX_ATTEMPTS
        times.
        """
        status = http_status(error)
        rejected = 400 <= status < 500 and status not in (401, 403, 408, 409, 429)
        failed = not is_refusal(error) and (
            isinstance(error, ValueError | TypeError) or self._attempts >= MAX_ATTEMPTS - 1)
        return (rejected or failed) and self._lifecycle_stage() == "active"

    def _lifecycle_stage(self) -> str | None:
        """Return "active" or, if the run was deleted in MLflow, "deleted"; None if the server does not answer."""
        try:
            return str(self._client.get_run(self._state["run_id"]).info.lifecycle_stage)
        except Exception:
            return None

    def _save_state(self, **changes: Any) -> None:
        self._state |= changes
        if self._stopped:
            return
        with contextlib.suppress(OSError):  # full disk: the journal raises the error; sending twice is harmless
            temporary = self._state_file.with_suffix(".json.tmp")
            temporary.write_text(json.dumps(self._state))
            temporary.replace(self._state_file)

    def _reason(self, error: Exception) -> str:
        if refusal := permissions.find_refusal(error):
            return mask_urls(refusal.describe())
        text = " ".join(str(error).split()) or type(error).__name__
        if found := re.search(r"\[Errno -?\d+\] [^\"')>]+", text):
            text = found[0]
        elif "timed out" in text:
            text = "no answer in time"
        return mask_urls(text, self._uri)[:200]
