"""Defines jobs of a sweep, states of jobs, what they cost, the interface of backends, and exceptions of backends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dreambooth.config.hardware import RunBudget
from dreambooth.errors import ConfigError, DoesNotFit

WAITING, SUBMITTING, RUNNING, COMPLETED, FAILED, STOPPED, UNKNOWN = (
    "Waiting", "Submitting", "InProgress", "Completed", "Failed", "Stopped", "Unknown")
PRUNED = "Pruned"  # status in the table of a sweep: the search has ended the run early
FINAL_STATUSES = (COMPLETED, FAILED, STOPPED, PRUNED)


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
    spot_usd_hour: float | None = None  # price per hour of all the job's spot instances, if it has them; None: unknown

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
    reported: tuple[int, float] | None = None  # step and value that the run last reported to a search, lower is better

    @property
    def ended(self) -> bool:
        return self.status in FINAL_STATUSES

    @property
    def may_be_billed(self) -> bool:
        """Whether the job may cost money now. Also true if the job was submitted and no answer has arrived yet."""
        return not self.ended and self.status != WAITING

    def cost_usd(self, job: Job) -> float | None:
        """Return the cost of a job in US dollars; None if the price is unknown.

        If the job has ended, this is the billed cost. Otherwise it is the cost so far. For a spot instance whose
        price the user has not given, the cost so far is an upper bound, computed from the on-demand price.
        """
        if job.usd_hour is None:
            return None
        if self.billed_seconds is None:
            return self.seconds / 3600 * (job.spot_usd_hour or job.usd_hour)
        return self.billed_seconds / 3600 * job.usd_hour  # AWS bills less time of a spot instance


STOP_SECONDS = 120.0  # in which SageMaker lets a stopped job save


@dataclass
class Spending:
    """The budget of a sweep, and what the jobs of its earlier batches have used."""

    budget: RunBudget
    usd: float = 0.0
    hours: float = 0.0

    def check(self, jobs: Sequence[Job]) -> None:
        """Check the estimates of jobs before the first of them is submitted.

        Raises:
            ConfigError: the price of a job is unknown, so that budget.max_usd cannot be kept.
            DoesNotFit: the jobs need more than is left; the message says how many of them fit.
        """
        if self.budget.max_usd is not None and any(job.usd_hour is None for job in jobs):
            raise ConfigError(f"budget.max_usd={self.budget.max_usd:g} cannot be kept, because the price of a job is "
                              "unknown: type hydra.launcher.price_usd_hour=PRICE, or budget.max_hours=HOURS")
        hours = [None if job.estimate_seconds is None else job.estimate_seconds / 3600 for job in jobs]
        if problem := self.budget.shortfall("job", [job.estimate_usd for job in jobs], hours, self.usd, self.hours):
            raise DoesNotFit(f"{problem}; nothing was submitted")

    def passed(self, jobs: Sequence[Job], states: Sequence["JobState"], margin: float) -> str:
        """Return the limit that running jobs would pass within `margin` seconds, and what is used; "" if there is none.

        Args:
            margin: seconds until the jobs would have stopped, for which they are billed.
        """
        running = [job for job, state in zip(jobs, states, strict=True) if state.may_be_billed]
        more = margin / 3600
        usd, hours = self._used(jobs, states)
        for key, limit, used, rest, text in (
                ("max_usd", self.budget.max_usd, usd, more * sum(job.spot_usd_hour or job.usd_hour or 0.0
                                                                 for job in running), f"${usd:.2f}"),
                ("max_hours", self.budget.max_hours, hours, more * len(running), f"{hours:.2f} h")):
            if limit is not None and used + rest >= limit:
                return f"budget.{key}={limit:g} is used up ({text})"
        return ""

    def holds(self, job: Job, jobs: Sequence[Job], states: Sequence["JobState"]) -> bool:
        """Return whether the budget holds one more job beside the estimates of those that run."""
        usd, hours = self._used(jobs, states)
        usds, times = [job.estimate_usd or 0.0], [(job.estimate_seconds or 0.0) / 3600]
        for other, state in zip(jobs, states, strict=True):
            if state.may_be_billed and other is not job:
                usds.append(max(0.0, (other.estimate_usd or 0.0) - (state.cost_usd(other) or 0.0)))
                times.append(max(0.0, (other.estimate_seconds or 0.0) - state.seconds) / 3600)
        return not self.budget.shortfall("job", [sum(usds)], [sum(times)], usd, hours)

    def add(self, jobs: Sequence[Job], states: Sequence["JobState"]) -> None:
        """Add what the jobs of a batch have used, before the next batch."""
        self.usd, self.hours = self._used(jobs, states)

    def _used(self, jobs: Sequence[Job], states: Sequence["JobState"]) -> tuple[float, float]:
        """Return US dollars and hours of all batches."""
        pairs = list(zip(jobs, states, strict=True))
        return (self.usd + sum(state.cost_usd(job) or 0.0 for job, state in pairs),
                self.hours + sum(max(state.seconds, state.billed_seconds or 0.0) for _, state in pairs) / 3600)


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


class Search(Protocol):
    """A search that may end jobs early. Jobs have the numbers of their trials."""

    def prune(self, number: int, step: int, value: float) -> bool:
        """Record a value that a running job has measured; lower is better. Return whether the job has to be stopped."""
        ...

    def is_pruned(self, number: int) -> bool:
        """Return whether the search has asked for the end of this job, in this command or an earlier one."""
        ...


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
