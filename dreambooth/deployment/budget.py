"""The budget of an endpoint: checked against its price before it is created, and kept until it is deleted.

SageMaker bills an endpoint for each second from its creation to its deletion, so a budget is a time after which the
endpoint is deleted. The command stays and deletes it; AWS itself has no such limit.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime

from dreambooth.config.hardware import Budget
from dreambooth.deployment.autoscaler import Autoscaler
from dreambooth.deployment.endpoint_backend import EndpointBackend, EndpointState
from dreambooth.deployment.follow import Pace
from dreambooth.deployment.instances import Instance, greatest_count
from dreambooth.deployment.options import Deploy
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.storage import aws_errors


def find_problems(options: Deploy, instance: Instance) -> Iterator[str]:
    """Yield a sentence if the price is unknown, or if max_hours at the greatest price per hour pass max_usd."""
    budget = options.budget
    if budget.max_usd is None:
        return
    if instance.usd_hour is None:
        yield (f"the price of {instance.type} is not known, so budget.max_usd={budget.max_usd:g} cannot be kept: type "
               "price_usd_hour=PRICE")
        return
    count = greatest_count(options)
    most = count * instance.usd_hour
    if budget.max_hours is not None and (cost := most * budget.max_hours) > budget.max_usd:
        yield (f"{budget.max_hours:g} h of {count} x {instance.type} cost up to ${cost:.2f}, and budget.max_usd="
               f"{budget.max_usd:g} fits {budget.max_usd / most:.1f} h: type fewer budget.max_hours, or a higher "
               "budget.max_usd")


def describe(options: Deploy, instance: Instance) -> Iterator[str]:
    """Yield how long the budget lasts."""
    if options.budget.limits:
        most = None if instance.usd_hour is None else greatest_count(options) * instance.usd_hour
        hours, limit = options.budget.hours(most)
        yield f"{limit} lasts for {hours:.1f} h of serving, after which this command deletes the endpoint"


def check_left(options: Deploy, instance: Instance, state: EndpointState | None) -> None:
    """Raise DoesNotFit if an endpoint that exists has used its budget up before this command."""
    if state is None or state.created is None:
        return
    hours, limit = options.budget.hours(None if instance.usd_hour is None else instance.usd_hour * options.instances)
    if (used := _hours_since(state.created)) >= hours:
        raise DoesNotFit(f"{limit} is used up: the endpoint {state.name} has existed for {used:.1f} h; type a higher "
                         "limit, or delete it: type action=delete")


def _hours_since(moment: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - moment).total_seconds() / 3600)


def renew_expired_login(error: UserError, *services: EndpointBackend | Autoscaler) -> bool:
    """If AWS refused a call because the login has expired, let the services read it anew. Return whether it has."""
    expired = error.__cause__ is not None and aws_errors.needs_login(error.__cause__)
    if expired:
        with suppress(UserError):  # there is no login yet
            for service in services:
                service.renew_login()
    return expired


def watch(backend: EndpointBackend, endpoint: str, budget: Budget, usd_hour: float | None, pace: Pace,
          say: Callable[[str], None]) -> str:
    """Wait until the budget of an endpoint is used up, and return the limit, with what is used.

    The time is multiplied by the instances that run. The time before this call counts with the instances of now. If AWS
    does not answer, or the login has expired, they count as before.

    Args:
        usd_hour: price per hour of one instance; None: unknown.
        say: prints a line.

    Raises:
        UserError: AWS refuses to describe the endpoint, or the endpoint was deleted meanwhile.
    """
    usd = hours = 0.0
    count, last = 1, pace.clock()
    first, has_expired = True, False
    while True:
        try:
            state = backend.describe(endpoint)
        except UserError as error:
            if not aws_errors.may_answer_later(error.__cause__):
                raise
            if renew_expired_login(error, backend) and not has_expired:
                say(f"{error}; until then the budget is counted, but {endpoint} cannot be deleted")
                has_expired = True
        else:
            has_expired = False
            if state is None:
                raise UserError(f"the endpoint {endpoint} was deleted meanwhile, before its budget was used up")
            count = state.instances if state.instances is not None else count
            if first and state.created is not None:
                hours = _hours_since(state.created)
                usd = hours * count * (usd_hour or 0.0)
                first = False
        now = pace.clock()
        hours += (now - last) / 3600
        usd += (now - last) / 3600 * count * (usd_hour or 0.0)
        last = now
        coming = pace.poll_seconds / 3600  # until the next look
        if budget.max_hours is not None and hours + coming > budget.max_hours:
            return f"budget.max_hours={budget.max_hours:g} is used up ({hours:.2f} h)"
        if budget.max_usd is not None and usd + coming * count * (usd_hour or 0.0) > budget.max_usd:
            return f"budget.max_usd={budget.max_usd:g} is used up (${usd:.2f})"
        pace.sleep(pace.poll_seconds)
