"""A run as a job: what is asked for, what it looks like while it runs, and who runs it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

WAITING, SUBMITTING, RUNNING, COMPLETED, FAILED, STOPPED, UNKNOWN = (
    "Waiting", "Submitting", "InProgress", "Completed", "Failed", "Stopped", "Unknown")
ENDS = (COMPLETED, FAILED, STOPPED)


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int  # in the sweep
    name: str
    overrides: tuple[str, ...]  # as they were typed
    request: dict[str, Any]  # of CreateTrainingJob
    steps: int  # that it will train
    usd_hour: float | None = None  # of all its instances, on demand; None: unknown
    estimate_usd: float | None = None  # by the planner; None: unknown
    estimate_seconds: float | None = None

    @property
    def spot(self) -> bool:
        return bool(self.request.get("EnableManagedSpotTraining"))

    @property
    def machine(self) -> str:
        """Type of its instances, which a quota is for."""
        return str(self.request.get("ResourceConfig", {}).get("InstanceType", ""))


@dataclass
class Seen:
    """How a job stands."""

    status: str = WAITING
    detail: str = ""  # SageMaker's secondary status
    step: int | None = None
    loss: float | None = None
    seconds: float = 0.0  # of training so far
    billed: float | None = None  # seconds, at the end
    reason: str = ""  # of a failure
    result: dict[str, Any] = field(default_factory=dict)  # result.json

    @property
    def ended(self) -> bool:
        return self.status in ENDS

    @property
    def billing(self) -> bool:
        """Whether it may cost money now: also one that was sent off and got no answer yet."""
        return not self.ended and self.status != WAITING

    def usd(self, job: Job) -> float | None:
        """Billed cost at the end, else the cost so far: of a spot instance at most this."""
        if job.usd_hour is None:
            return None
        return (self.seconds if self.billed is None else self.billed) / 3600 * job.usd_hour


class Busy(Exception):
    """No job more can begin just now; one may when another has ended."""


class Unreachable(Exception):
    """Nobody answered; the jobs run on."""

    patience = 3600.0  # seconds without any answer, after which nobody waits for one


class LoggedOut(Unreachable):
    """AWS answers nobody until there is a new login; what was asked for was not begun."""

    def __init__(self, words: str, patience: float) -> None:
        super().__init__(words)
        self.patience = patience


class Backend(Protocol):
    """Who runs jobs. Every method but `stop_hint` may raise Unreachable, or UserError for good."""

    def submit(self, job: Job) -> Seen:
        """Begin a job, or find the one that was begun before. Raises Busy."""
        ...

    def look(self, job: Job) -> Seen:
        """How it stands."""
        ...

    def stop(self, job: Job) -> bool:
        """Ask it to save and stop. False: no such job runs."""
        ...

    def stop_hint(self, job: Job) -> str:
        """The command that stops it, for a person."""
        ...
