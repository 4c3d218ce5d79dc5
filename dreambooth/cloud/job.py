"""Defines jobs of a sweep, states of jobs, the interface of backends, and the exceptions that backends raise."""

from dataclasses import dataclass, field
from typing import Any, Protocol

WAITING, SUBMITTING, RUNNING, COMPLETED, FAILED, STOPPED, UNKNOWN = (
    "Waiting", "Submitting", "InProgress", "Completed", "Failed", "Stopped", "Unknown")
FINAL_STATUSES = (COMPLETED, FAILED, STOPPED)


@dataclass(frozen=True)
class Job:
    """One run of a sweep, with the request that starts the run on a backend."""

    number: int  # position in the sweep
    name: str
    overrides: tuple[str, ...]  # as the user typed them
    request: dict[str, Any]  # arguments of CreateTrainingJob
    steps: int  # train.max_train_steps
    usd_hour: float | None = None  # on-demand price per hour of all the job's instances; None: unknown
    estimate_usd: float | None = None  # the planner's estimate; None: unknown
    estimate_seconds: float | None = None
    defaults: tuple[str, ...] = ()  # one line per part of the request that comes from the SageMaker SDK's defaults

    @property
    def spot(self) -> bool:
        return bool(self.request.get("EnableManagedSpotTraining"))

    @property
    def instance_type(self) -> str:
        """Type of the job's instances. AWS has a quota for each type."""
        return str(self.request.get("ResourceConfig", {}).get("InstanceType", ""))


@dataclass
class JobState:
    """The state of a job when it was last polled."""

    status: str = WAITING
    detail: str = ""  # SageMaker's secondary status
    step: int | None = None
    loss: float | None = None
    seconds: float = 0.0  # training time so far
    billed_seconds: float | None = None  # None until the job has ended
    reason: str = ""  # why the job failed or was stopped
    result: dict[str, Any] = field(default_factory=dict)  # content of result.json

    @property
    def ended(self) -> bool:
        return self.status in FINAL_STATUSES

    @property
    def may_be_billed(self) -> bool:
        """Whether the job may cost money now. Also true if the job was submitted and no answer has arrived yet."""
        return not self.ended and self.status != WAITING

    def cost_usd(self, job: Job) -> float | None:
        """Return the cost of a job in US dollars; None if the price is unknown.

        If the job has ended, this is the billed cost. Otherwise it is the cost so far. For a spot instance, the cost
        so far is an upper bound, because it is computed from the on-demand price.
        """
        if job.usd_hour is None:
            return None
        return (self.seconds if self.billed_seconds is None else self.billed_seconds) / 3600 * job.usd_hour


class QuotaExceeded(Exception):
    """The AWS account's quota for the job's instance type is used up. Retry when another job has ended."""


class Unreachable(Exception):
    """The backend did not answer. The jobs continue to run."""

    patience = 3600.0  # seconds without an answer after which Follower.run raises UserError


class LoginRequired(Unreachable):
    """AWS rejects the credentials until the user logs in again.

    The rejected request had no effect. It can be repeated after the login.
    """

    def __init__(self, message: str, patience: float) -> None:
        super().__init__(message)
        self.patience = patience


class Backend(Protocol):
    """Interface of a backend, which runs jobs.

    Every method except `stop_command` may raise Unreachable (a retry may succeed) or UserError (a retry cannot
    succeed).
    """

    def submit(self, job: Job) -> JobState:
        """Start a job and return its state. If an earlier command has already started this job, only return its state.

        Raises:
            QuotaExceeded: the job cannot start now, because the AWS account's quota is used up.
        """
        ...

    def poll(self, job: Job) -> JobState:
        """Return the current state of a job."""
        ...

    def stop(self, job: Job) -> bool:
        """Send a job the signal to save and stop. Return False if the job is not running."""
        ...

    def stop_command(self, job: Job) -> str:
        """Return the command with which a user can stop the job."""
        ...
