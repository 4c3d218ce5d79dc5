"""Waits until an endpoint serves or is gone, and says meanwhile what happens and what it costs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from dreambooth.deployment.endpoint_backend import BROKEN, BUSY, MIXED, SERVING, EndpointBackend, EndpointState
from dreambooth.errors import UserError
from dreambooth.storage import aws_errors

LINE_SECONDS = 60.0  # between two lines while the status stays the same
PATIENCE = 600.0  # seconds without an answer of AWS after which waiting ends
ADVICE = (  # part of SageMaker's reason, in lower case -> what to type
    ("insufficientinstancecapacity", "AWS has no free instances of this type now: repeat the command later, or type "
     "another instance=TYPE"),
    ("unable to provision", "AWS has no free instances of this type now: repeat the command later, or type another "
     "instance=TYPE"),
    ("ping health check", "the container does not answer: type aws logs tail /aws/sagemaker/Endpoints/{name} to see "
     "its log, and more startup_minutes if it was still loading"),
    ("image", "the role must be allowed to pull the image, and image= must name one that exists (containers/push "
     "prints its name)"),
    ("pull", "the role must be allowed to pull the image, and image= must name one that exists (containers/push "
     "prints its name)"),
    ("model data", "the role must be allowed to read the model in S3: docs/deployment.md has its policy"),
    ("alarm", "an alarm of rollback_alarms went off: the earlier version serves"),
    ("access", "the role lacks a permission: docs/deployment.md has its policy"))


@dataclass(frozen=True)
class Pace:
    """How long to wait. Tests pass other functions for time."""

    poll_seconds: float = 15.0
    timeout_minutes: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


class UpdateRefused(UserError):
    """An update failed, and the endpoint serves the version that it served before."""


def wait_until_serving(backend: EndpointBackend, endpoint: str, config: str, pace: Pace, say: Callable[[str], None],
                       usd_hour: float | None = None) -> EndpointState:
    """Wait until an endpoint serves a configuration, and return its state.

    Args:
        usd_hour: price per hour of the instances that start; None: unknown.

    Raises:
        UpdateRefused: SageMaker has gone back to the version before.
        UserError: the endpoint has failed, or does not serve in time.
    """
    settled = 0  # consecutive answers that say that another version serves

    def check(state: EndpointState | None) -> bool:
        nonlocal settled
        if state is None:
            raise UserError(f"the endpoint {endpoint} was deleted meanwhile: repeat the command to create it again")
        if state.status in SERVING and state.config == config and state.pending is None:
            return True
        settled = 0 if state.status in BUSY or state.pending is not None else settled + 1
        if settled < 2:  # the first such answer may be older than the update
            return False
        if state.status in BROKEN:
            raise UserError(f"the endpoint {endpoint} {describe_failure(state)}")
        if state.status in SERVING:
            raise UpdateRefused(f"the update of {endpoint} failed and {state.config} serves as before: "
                                f"{explain_reason(state)}")
        return False

    state = _poll(backend, endpoint, check, pace, say, usd_hour)
    assert state is not None
    return state


def wait_until_gone(backend: EndpointBackend, endpoint: str, pace: Pace, say: Callable[[str], None]) -> None:
    """Wait until an endpoint does not exist any more.

    Raises:
        UserError: it still exists when the time is over, or cannot be deleted.
    """
    def check(state: EndpointState | None) -> bool:
        if state is not None and state.status in BROKEN and state.reason and "delet" in state.reason.lower():
            raise UserError(f"the endpoint {endpoint} could not be deleted: {explain_reason(state)}")
        return state is None

    _poll(backend, endpoint, check, pace, say, None)


def wait_until_idle(backend: EndpointBackend, endpoint: str, pace: Pace, say: Callable[[str], None]) -> None:
    """Wait until an endpoint is not being changed."""
    _poll(backend, endpoint, lambda state: state is None or state.status not in BUSY, pace, say, None)


def describe_failure(state: EndpointState) -> str:
    """Return the end of a sentence about an endpoint that does not work: its status and SageMaker's reason."""
    serves = "serves two versions at a time" if state.status == MIXED else "serves nothing"
    return f"is {state.status} and {serves}: {explain_reason(state)}"


def explain_reason(state: EndpointState) -> str:
    """Return SageMaker's reason of a failure, and what to type."""
    reason = " ".join(state.reason.split())[:400].rstrip(".") or "SageMaker gives no reason"
    advice = next((text for words, text in ADVICE if words in reason.lower()), None)
    return f"{reason}; {advice.format(name=state.name)}" if advice else reason


def _poll(backend: EndpointBackend, endpoint: str, check: Callable[[EndpointState | None], bool], pace: Pace,
          say: Callable[[str], None], usd_hour: float | None) -> EndpointState | None:
    start = last_line = last_answer = pace.clock()
    last_status = ""
    silent = False
    while True:
        try:
            state = backend.describe(endpoint)
            last_answer, silent = pace.clock(), False
        except UserError as error:
            cause = error.__cause__
            if cause is None or not aws_errors.is_transient(cause) or pace.clock() - last_answer > PATIENCE:
                raise
            if not silent:
                say(f"AWS does not answer ({aws_errors.error_code(cause)}); trying again")
            silent = True
        else:
            if check(state):
                return state
            now = pace.clock()
            status = state.status if state else ""
            if status != last_status or now - last_line >= LINE_SECONDS:
                minutes = (now - start) / 60
                cost = "" if usd_hour is None else f", about ${minutes / 60 * usd_hour:.2f} so far"
                say(f"{endpoint}  {status}" + (f"  {minutes:.0f} min{cost}" if minutes >= 0.5 else ""))
                last_status, last_line = status, now
        if pace.clock() - start > pace.timeout_minutes * 60:
            raise UserError(f"the endpoint {endpoint} is still {last_status or 'changing'} after "
                            f"{pace.timeout_minutes:g} minutes: repeat the command to follow it further")
        pace.sleep(pace.poll_seconds)
