"""Trackers: where a run's metrics, images and settings go besides its folder. The only file that knows MLflow.

Everything is journalled first (`metrics.jsonl`, see journal.py). A background thread ships the journal to MLflow and
keeps in `mlflow.json` how far it got, so a dead or slow server never stops or slows the run: what it missed is sent
when it is back, by this process or by the next one on the same run folder, into the same MLflow run. Sending an entry
twice (a kill between the server's answer and mlflow.json) changes nothing: steps and times come from the journal.
"""

import atexit
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.tracking.journal import NullTracker, Tracker
from dreambooth.tracking.mlflow_auth import LOGIN, REFUSES
from dreambooth.tracking.mlflow_shipper import Shipper, Warn, log_warning

__all__ = ["MlflowTracker", "NullTracker", "Tracker", "open_tracker"]
PATIENT = True  # start shipping with the first training step, not before
START = 60.0  # seconds that a required server has to answer at the start


def open_tracker(kind: str, run_dir: Path, *, run_root: Path, run_name: str, uri: str | None = None,
                 experiment: str = "dreambooth", required: bool = False, warn: Warn = log_warning,
                 trains: bool = True) -> Tracker:
    """The tracker of `tracking.kind`: "mlflow" or "none". A uri of None is `mlflow.db` in the run root.

    Args:
        trains: see NullTracker.

    Raises:
        UserError: `required` and the server does not answer.
    """
    if kind == "none":
        return NullTracker(run_dir, trains)
    root = run_root.resolve()
    return MlflowTracker(run_dir, uri=uri or f"sqlite:///{root}/mlflow.db", experiment=experiment, run_name=run_name,
                         required=required, artifact_root=None if uri else root / "mlartifacts", warn=warn,
                         trains=trains)


class MlflowTracker(NullTracker):
    """Journals in the caller's thread, ships in a thread of its own: no call waits for MLflow but close().

    With `required`, a server that does not answer raises UserError: here, or at the next call (which is journalled).
    `warn` is called in the shipping thread too.
    """

    def __init__(self, run_dir: Path, *, uri: str, experiment: str, run_name: str, required: bool = False,
                 artifact_root: Path | None = None, warn: Warn = log_warning, trains: bool = True) -> None:
        super().__init__(run_dir, trains)
        self._required, self._warn, self._closed = required, warn, False
        self._shipper = Shipper(self.path, uri, experiment, run_name, artifact_root, warn)
        if required or not PATIENT:
            self._begin()
        if required and not (self._shipper.attempted.wait(START) and self._shipper.outage is None):
            self._shipper.stop(0.0)
            super().close()
            raise self._unreachable()
        if trains:
            self.status("RUNNING")

    def metrics(self, step: int, values: Mapping[str, float]) -> bool:
        if step > 0:
            self._begin()
        return super().metrics(step, values)

    def _begin(self) -> None:
        """Start shipping, once. Importing MLflow and making its tables takes seconds of CPU, so the first training
        step comes first."""
        if self._shipper.ident is None:
            atexit.register(self._shipper.stop, 1.0)  # a thread inside C code while Python goes down may crash it
            self._shipper.start()

    def url(self) -> str | None:
        return self._shipper.url()

    def close(self, status: str | None = "FINISHED") -> None:
        """Send what is left, waiting a bounded time, and end the run with `status`. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._begin()
        try:
            super().close(status)
        finally:
            self._shipper.finish()
            atexit.unregister(self._shipper.stop)
        waiting = self._shipper.waiting()
        if waiting and self._required and status == "FINISHED":
            raise self._unreachable()
        if waiting:
            self._warn(f"{waiting} entries of {self.path} are not in MLflow yet: repeat the command when "
                       f"{self._shipper.shown} {'takes this user' if self._refused else 'answers'}, and they are sent")

    def _append(self, body: dict[str, Any]) -> bool:
        new = super()._append(body)
        if self._required and not self._closed and self._shipper.outage is not None:
            raise self._unreachable()
        return new

    @property
    def _refused(self) -> bool:
        return (self._shipper.outage or "").startswith(REFUSES)

    def _unreachable(self) -> UserError:
        way = LOGIN if self._refused else "start the server (mlflow server --port ...)"
        return UserError(f"MLflow at {self._shipper.shown} {self._shipper.outage or 'does not answer'}: {way}, or go "
                         "on without it by tracking.required=false")
