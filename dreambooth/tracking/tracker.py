"""Trackers: record a run's metrics, images and settings in its folder and in MLflow. `open_tracker` chooses one.

Everything is written to the journal first (`metrics.jsonl`, see journal.py). A background thread sends the journal to
MLflow and records in `mlflow.json` how far it got, so a dead or slow server neither stops nor slows the run. Entries
that the server missed are sent to the same MLflow run when the server is reachable again: by this process, or by the
next one that opens the same run folder. Sending an entry twice (after a kill between the server's answer and the
update of mlflow.json) changes nothing, because steps and times come from the journal.
"""

import atexit
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dreambooth.errors import UserError
from dreambooth.tracking.journal import Journal
from dreambooth.tracking.mlflow_client import LOGIN_HINT, REFUSES_USER
from dreambooth.tracking.mlflow_shipper import Shipper, Warn, log_warning

SHIP_FROM_FIRST_STEP = True  # start the sending thread after the first training step; False: when the tracker is opened
START_TIMEOUT = 60.0  # seconds within which a required server must answer when the tracker is opened


class Tracker(Protocol):
    """Interface of trackers, which record a run. The `log_*` and `set_tags` methods return False if nothing was new."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> bool: ...
    def log_image(self, step: int, key: str, path: Path) -> bool: ...
    def log_artifact(self, path: Path, folder: str = "") -> bool: ...
    def log_params(self, values: Mapping[str, str]) -> bool: ...
    def set_tags(self, values: Mapping[str, str]) -> bool: ...
    def log_dataset(self, values: Mapping[str, str]) -> bool: ...
    def url(self) -> str | None: ...
    def close(self, status: str) -> None: ...


def open_tracker(kind: str, run_dir: Path, *, run_root: Path, run_name: str, uri: str | None = None,
                 experiment: str = "dreambooth", required: bool = False, warn: Warn = log_warning,
                 update_status: bool = True) -> Tracker:
    """Open the tracker of `tracking.kind`: "mlflow" or "none".

    Args:
        uri: address of the tracking server; None: `mlflow.db` in the run root.
        update_status: see JournalTracker.

    Raises:
        UserError: `required` is set and the server does not answer.
    """
    if kind == "none":
        return JournalTracker(run_dir, update_status)
    root = run_root.resolve()
    return MlflowTracker(run_dir, uri=uri or f"sqlite:///{root}/mlflow.db", experiment=experiment, run_name=run_name,
                         required=required, artifact_root=None if uri else root / "mlartifacts", warn=warn,
                         update_status=update_status)


class NoOpTracker:
    """Records nothing: the tracker of every process except the first."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> bool:
        return False

    def log_image(self, step: int, key: str, path: Path) -> bool:
        return False

    def log_artifact(self, path: Path, folder: str = "") -> bool:
        return False

    def log_params(self, values: Mapping[str, str]) -> bool:
        return False

    def set_tags(self, values: Mapping[str, str]) -> bool:
        return False

    def log_dataset(self, values: Mapping[str, str]) -> bool:
        return False

    def url(self) -> str | None:
        return None

    def close(self, status: str) -> None:
        return None


class JournalTracker(Journal):
    """Writes only `metrics.jsonl`. If an MlflowTracker is opened on the same folder later, it sends the whole file.

    Args:
        update_status: False for commands that only read a run (evaluate, promote): if the run has ended, its status and
            end time stay as they are.
    """

    def __init__(self, run_dir: Path, update_status: bool = True) -> None:
        super().__init__(run_dir / "metrics.jsonl")
        self._update_status = update_status

    def close(self, status: str | None = None) -> None:
        super().close(status if self._update_status or not self.ended else None)

    def url(self) -> str | None:
        return None


class MlflowTracker(JournalTracker):
    """Writes the journal in the caller's thread and sends it to MLflow from another: only close() waits for MLflow.

    With `required`, UserError is raised if the server does not answer: by the constructor, or by the next call, whose
    entry is still written to the journal. `warn` is also called from the thread that sends.
    """

    def __init__(self, run_dir: Path, *, uri: str, experiment: str, run_name: str, required: bool = False,
                 artifact_root: Path | None = None, warn: Warn = log_warning, update_status: bool = True) -> None:
        super().__init__(run_dir, update_status)
        self._required, self._warn, self._closed = required, warn, False
        self._shipper = Shipper(self.path, uri, experiment, run_name, artifact_root, warn)
        if required or not SHIP_FROM_FIRST_STEP:
            self._start_shipping()
        if required and not (self._shipper.attempted.wait(START_TIMEOUT) and self._shipper.outage is None):
            self._shipper.stop(0.0)
            super().close()
            raise self._unreachable()
        if update_status:
            self.set_status("RUNNING")

    def log_metrics(self, step: int, values: Mapping[str, float]) -> bool:
        if step > 0:
            self._start_shipping()
        return super().log_metrics(step, values)

    def _start_shipping(self) -> None:
        """Start the thread that sends the journal, unless it has been started.

        Importing MLflow and creating its tables takes seconds of CPU time, so this waits for the first training step.
        """
        if self._shipper.ident is None:
            atexit.register(self._shipper.stop, 1.0)  # a thread in C code during interpreter shutdown may crash it
            self._shipper.start()

    def url(self) -> str | None:
        return self._shipper.url()

    def close(self, status: str | None = "FINISHED") -> None:
        """Send the remaining entries, within a limited time, and set the final status. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._start_shipping()
        try:
            super().close(status)
        finally:
            self._shipper.finish()
            atexit.unregister(self._shipper.stop)
        unsent = self._shipper.count_unsent()
        if unsent and self._required and status == "FINISHED":
            raise self._unreachable()
        if unsent:
            self._warn(f"{unsent} entries of {self.path} are not in MLflow yet: repeat the command when "
                       f"{self._shipper.display_uri} {'accepts this user' if self._refused else 'answers'}, and they "
                       "are sent")

    def _append(self, body: dict[str, Any]) -> bool:
        appended = super()._append(body)
        if self._required and not self._closed and self._shipper.outage is not None:
            raise self._unreachable()
        return appended

    @property
    def _refused(self) -> bool:
        return (self._shipper.outage or "").startswith(REFUSES_USER)

    def _unreachable(self) -> UserError:
        remedy = LOGIN_HINT if self._refused else "start the server (mlflow server --port ...)"
        problem = self._shipper.outage or "does not answer"
        return UserError(f"MLflow at {self._shipper.display_uri} {problem}: {remedy}, or continue without it: "
                         "type tracking.required=false")
