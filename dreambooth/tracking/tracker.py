"""Trackers: record the metrics, images and settings of a run in the run folder, and in MLflow, TensorBoard and W&B.

Every entry is written to the journal first (`metrics.jsonl`, see journal.py). A background thread sends the journal to
MLflow and records in `mlflow.json` the offset up to which entries were sent. A dead or slow server therefore neither
stops nor slows the run. When the server is reachable again, the missing entries are sent to the same MLflow run, by
this process or by the next process that opens the run folder. An entry is sent twice if the process is killed after the
server's response and before the update of mlflow.json. Sending it twice changes nothing in MLflow, because steps and
times come from the journal. TensorBoard and W&B read the same journal, see journal_follower.py.
"""

import atexit
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dreambooth.config.enums import TrackingKind
from dreambooth.errors import UserError
from dreambooth.tracking import wandb_backend
from dreambooth.tracking.journal import Journal
from dreambooth.tracking.journal_follower import Backend, JournalFollower
from dreambooth.tracking.mlflow_client import DeletedExperimentError, is_refusal, remedy
from dreambooth.tracking.mlflow_database import database_uri
from dreambooth.tracking.mlflow_shipper import Shipper, Warn, log_warning
from dreambooth.tracking.tensorboard_backend import TensorBoardBackend

SHIP_FROM_FIRST_STEP = True  # True: start the sending thread after the first training step; False: at once
WITHOUT_MLFLOW = "continue without it: type tracking.required=false"  # what a training run can do
START_TIMEOUT = 60.0  # seconds that opening a tracker waits for a required server to answer


class Tracker(Protocol):
    """Interface of all trackers. The methods `log_*` and `set_tags` return False if nothing new was recorded."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> bool: ...
    def log_image(self, step: int, key: str, path: Path) -> bool: ...
    def log_artifact(self, path: Path, folder: str = "") -> bool: ...
    def log_params(self, values: Mapping[str, str]) -> bool: ...
    def set_tags(self, values: Mapping[str, str]) -> bool: ...
    def log_dataset(self, values: Mapping[str, str]) -> bool: ...
    def count_missing(self, name: str, last: int) -> int: ...
    def url(self) -> str | None: ...
    def close(self, status: str) -> None: ...


def open_tracker(kind: str, run_dir: Path, *, run_root: Path, run_name: str, uri: str | None = None,
                 experiment: str = "dreambooth", required: bool = False, warn: Warn = log_warning,
                 update_status: bool = True, alternative: str = WITHOUT_MLFLOW,
                 experiment_key: str = "tracking.experiment", sweep: str | None = None) -> Tracker:
    """Open a tracker: an MlflowTracker if `kind` is "mlflow" or "all", and otherwise a JournalTracker.

    Args:
        kind: mlflow, tensorboard, wandb, all (these three) or none.
        uri: address of the MLflow server; None: the sqlite database `mlflow.db` in `run_root`.
        update_status: see JournalTracker.
        alternative: what the user can do instead of repairing the server. The message of the UserError ends with it.
        experiment_key: the configuration key that names the experiment, for messages.
        sweep: name of the sweep to which the run belongs; None: none.

    Raises:
        UserError: `required` is True and the server does not answer, or W&B has no API key.
    """
    names, backends = TrackingKind(kind).backends, list[Backend]()
    if "tensorboard" in names:
        backends.append(TensorBoardBackend(run_dir))
    if "wandb" in names:
        wandb_backend.check_login()
        backends.append(wandb_backend.WandbBackend(run_dir, experiment, run_name, sweep))
    if "mlflow" not in names:
        return JournalTracker(run_dir, update_status, backends)
    root = run_root.resolve()
    return MlflowTracker(run_dir, uri=uri or database_uri(root / "mlflow.db"), experiment=experiment, run_name=run_name,
                         required=required, artifact_root=None if uri else root / "mlartifacts", warn=warn,
                         update_status=update_status, alternative=alternative, experiment_key=experiment_key,
                         backends=backends)


class NoOpTracker:
    """A tracker that records nothing. Every process except the process with rank 0 uses this tracker."""

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

    def count_missing(self, name: str, last: int) -> int:
        return 0

    def url(self) -> str | None:
        return None

    def close(self, status: str) -> None:
        return None


class JournalTracker(Journal):
    """A tracker that writes the journal, `metrics.jsonl`. Threads pass the journal to `backends`.

    If an MlflowTracker opens the same run folder later, the MlflowTracker sends the journal to MLflow.

    Args:
        update_status: whether the status and end time of a run that has already ended may change. False for commands
            that do not train (evaluate, promote).
    """

    def __init__(self, run_dir: Path, update_status: bool = True, backends: Sequence[Backend] = ()) -> None:
        super().__init__(run_dir / "metrics.jsonl")
        self._update_status = update_status
        self._followers = [JournalFollower(self.path, backend) for backend in backends]

    def log_metrics(self, step: int, values: Mapping[str, float]) -> bool:
        if step > 0:  # the packages of the backends take a second to import: after the first step, as with MLflow
            for follower in self._followers:
                follower.start()
        return super().log_metrics(step, values)

    def close(self, status: str | None = None) -> None:
        super().close(status if self._update_status or not self.ended else None)
        for follower in self._followers:
            follower.finish()
        self._followers = []

    def url(self) -> str | None:
        return None


class MlflowTracker(JournalTracker):
    """A tracker that writes the journal in the caller's thread and sends it to MLflow in a background thread.

    Only two methods wait for MLflow: close(), and the constructor if `required` is True. If `required` is True and the
    server does not answer, the constructor or the next call that records an entry raises UserError. The entry of this
    call is still written to the journal. Both threads may call `warn`.
    """

    def __init__(self, run_dir: Path, *, uri: str, experiment: str, run_name: str, required: bool = False,
                 artifact_root: Path | None = None, warn: Warn = log_warning, update_status: bool = True,
                 alternative: str = WITHOUT_MLFLOW, experiment_key: str = "tracking.experiment",
                 backends: Sequence[Backend] = ()) -> None:
        super().__init__(run_dir, update_status, backends)
        self._required, self._warn, self._closed = required, warn, False
        self._uri, self._alternative = uri, alternative
        # If the server is required, the UserError tells of an outage; a warning would say that the run continues.
        self._shipper = Shipper(self.path, uri, experiment, run_name, artifact_root, warn, not required,
                                experiment_key)
        if required or not SHIP_FROM_FIRST_STEP:
            self._start_shipping()
        if required and not (self._shipper.attempted.wait(START_TIMEOUT) and self._shipper.outage is None):
            self._shipper.stop(0.0)
            Journal.close(self)  # without a start of the backends
            raise self._unreachable()
        if update_status:
            self.set_status("RUNNING")

    def log_metrics(self, step: int, values: Mapping[str, float]) -> bool:
        if step > 0:
            self._start_shipping()
        return super().log_metrics(step, values)

    def _start_shipping(self) -> None:
        """Start the thread that sends the journal, unless it has been started.

        The start is delayed until the first training step, because importing MLflow and creating its tables takes
        seconds of CPU time.
        """
        if self._shipper.ident is None:
            atexit.register(self._shipper.stop, 1.0)  # a thread in C code may crash the interpreter at exit
            self._shipper.start()

    def url(self) -> str | None:
        return self._shipper.url()

    def close(self, status: str | None = "FINISHED") -> None:
        """Write the final status, then send the remaining entries within a limited time. A second call does nothing."""
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
            entries = f"{unsent} entries" if unsent > 1 else "1 entry"
            if isinstance(error := self._shipper.error, DeletedExperimentError):
                self._warn(f"{entries} of {self.path} not in MLflow yet: {error.remedy}, and repeat the command")
                return
            self._warn(f"{entries} of {self.path} not in MLflow yet: repeat the command when "
                       f"{self._shipper.display_uri} {'accepts this user' if self._refused else 'answers'}, and they "
                       "are sent")

    def _append(self, body: dict[str, Any]) -> bool:
        appended = super()._append(body)
        if self._required and not self._closed and self._shipper.outage is not None:
            raise self._unreachable()
        return appended

    @property
    def _refused(self) -> bool:
        return (error := self._shipper.error) is not None and is_refusal(error)

    def _unreachable(self) -> UserError:
        problem, advice = self._shipper.outage or "does not answer", remedy(self._uri, self._shipper.error)
        return UserError(f"MLflow at {self._shipper.display_uri} {problem}: {advice}, or {self._alternative}")
