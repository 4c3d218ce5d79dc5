"""Changes of one endpoint, on which the actions of sagemaker_deployment.py are built: create, update, wait, delete.

Every step sets a state that can be set again, so that a command that was interrupted anywhere is repeated to complete
it. From the moment when an endpoint may exist, every error says so, with the command that deletes it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from dreambooth.deployment.autoscaler import FOREIGN, KEPT, Autoscaler
from dreambooth.deployment.endpoint_backend import EndpointBackend, EndpointState, StoredVersion
from dreambooth.deployment.endpoint_requests import Scaling, build_update
from dreambooth.deployment.follow import (
    Pace,
    UpdateRefused,
    describe_failure,
    wait_until_gone,
    wait_until_idle,
    wait_until_serving,
)
from dreambooth.deployment.instances import price_of
from dreambooth.deployment.options import Action, Deploy
from dreambooth.errors import DreamBoothError, Interrupted, UserError
from dreambooth.storage import aws_errors
from dreambooth.utils import quoting


@dataclass
class Mark:
    """Whether the endpoint exists, or may exist, when something goes wrong."""

    exists: bool = False
    may_exist: bool = False


@dataclass
class EndpointChanges:
    """Changes of one endpoint.

    Args:
        options: `name` is set.
        say: prints a line.
    """

    options: Deploy
    backend: EndpointBackend
    autoscaler: Autoscaler
    say: Callable[[str], None]
    pace: Pace = field(default_factory=Pace)

    @property
    def name(self) -> str:
        """Name of the endpoint."""
        assert self.options.name is not None
        return self.options.name

    def find_own(self) -> EndpointState | None:
        """Return the state of the endpoint, or None if there is none.

        Raises:
            UserError: the endpoint was not created by this package.
        """
        state = self.backend.describe(self.name)
        if state is not None and not self.backend.is_owned(state):
            raise UserError(f"the endpoint {self.name} was not created by dreambooth (it has no tag "
                            f"dreambooth:endpoint={self.name}) and is left alone: type another name=NAME")
        return state

    def settle(self, state: EndpointState | None) -> EndpointState | None:
        """Wait while autoscaling or AWS changes the instances of an endpoint, and return its state afterwards.

        AWS refuses an update meanwhile. The state is Updating then, as during an update, but no other version comes.
        """
        if state is None or state.pending is not None or state.status not in ("Updating", "SystemUpdating"):
            return state
        self.say(f"{self.name} is {state.status}: AWS changes its instances; waiting until that has ended")
        wait_until_idle(self.backend, self.name, self.pace, self.say)
        return self.find_own()

    def require_endpoint(self) -> EndpointState:
        state = self.find_own()
        if state is None:
            raise UserError(f"there is no endpoint {self.name} in {self.backend.region}: type another name=NAME, set "
                            "AWS_DEFAULT_REGION, or deploy with run=runs/NAME")
        return state

    def create(self, request: dict[str, Any], instance_type: str, mark: Mark) -> None:
        mark.may_exist = True  # from here on, whatever happens
        try:
            self.backend.create_endpoint(request, instance_type)
        except UserError as error:
            cause = error.__cause__
            mark.may_exist = cause is None or aws_errors.is_transient(cause)  # otherwise AWS has refused it
            raise
        mark.exists = True

    def clear_away(self, state: EndpointState) -> None:
        """Delete an endpoint that can do nothing else, so that it can be created again."""
        if state.status != "Deleting":
            self.say(f"the endpoint {self.name} {describe_failure(state)}; it is deleted and created again")
            self.autoscaler.remove(self.name)
            self.delete_endpoint()
        else:
            wait_until_gone(self.backend, self.name, self.pace, self.say)

    def check_foreign_scaling(self, state: EndpointState, instance_type: str, scaling: Scaling | None) -> None:
        """Check that autoscaling that others have registered allows an update, and keeps to max_usd_hour.

        Args:
            scaling: the autoscaling that the new version asks for.

        Raises:
            UserError: it does not. Nothing was changed.
        """
        registered = self.autoscaler.find(self.name)
        if registered is None or registered.is_own:
            return
        foreign, fleet = FOREIGN.format(self.name), self.backend.describe_fleet(state.config)
        if scaling is not None:
            raise UserError(KEPT.format(self.name))
        if fleet is not None and fleet.instance_type != instance_type:
            raise UserError(f"{foreign}, and AWS refuses another instance type as long as it exists: type "
                            f"instance={fleet.instance_type}, or deregister it first")
        limit, price = self.options.max_usd_hour, price_of(self.options, instance_type)
        if limit is not None and price is not None and registered.greatest * price > limit:
            raise UserError(f"{foreign} and may run {registered.greatest} x {instance_type}, "
                            f"${registered.greatest * price:.4g} per hour, above max_usd_hour={limit:g}: type a higher "
                            "max_usd_hour, or change it first")

    def update(self, state: EndpointState, stored: StoredVersion, instance_type: str) -> None:
        """Start an update to a version. AWS refuses to change the instance type of an endpoint with autoscaling."""
        fleet = self.backend.describe_fleet(state.config)
        keeps_type = fleet is not None and fleet.instance_type == instance_type
        registered = self.autoscaler.find(self.name)
        removes = registered is not None and registered.is_own and (not keeps_type or stored.scaling is None)
        # An asynchronous endpoint may have no instance: keeping that number would test nothing.
        keeps = registered is not None and not removes and not state.is_async
        try:
            if removes:
                self.autoscaler.remove(self.name)
            self.say(f"updating the endpoint {self.name} from {state.config} to {stored.name}; {state.config} serves "
                     "until the new instances answer, and both are paid meanwhile")
            self.backend.update_endpoint(build_update(self.name, stored.name, self.options, keeps), instance_type)
        except (UserError, KeyboardInterrupt):
            if removes:
                self._restore_scaling(state.config)
            raise

    def _restore_scaling(self, config: str) -> None:
        """Set the autoscaling of the version `config` again, unless the endpoint is being updated to another one."""
        try:
            state = self.backend.describe(self.name)
            if state is None or state.config != config or state.pending is not None:
                return
            earlier = next((item for item in self.backend.list_versions(self.name) if item.name == config), None)
            if earlier is not None:
                self.autoscaler.apply(self.name, earlier.scaling)
        except UserError:  # the reason why the update failed is more important
            self.say(f"{config} serves without its autoscaling, which could not be set again: repeat the command")

    def finish(self, stored: StoredVersion, scaling: Scaling | None, before: EndpointState | None,
                usd_hour: float | None) -> None:
        """Wait until a version serves, set its autoscaling, and record when it began to serve.

        If SageMaker has gone back to the version before, its autoscaling is set again.
        """
        try:
            wait_until_serving(self.backend, self.name, stored.name, self.pace, self.say, usd_hour)
        except UpdateRefused:
            if before is not None:
                self._restore_scaling(before.config)
            raise
        if not stored.served or before is None or before.config != stored.name:
            self.backend.mark_served(stored, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        self.autoscaler.apply(self.name, scaling)
        self.say(f"{self.name}  InService  {stored.name}" + (f"  {scaling.describe()}" if scaling else ""))

    def delete_endpoint(self) -> None:
        if not self.backend.delete_endpoint(self.name):
            self.say(f"{self.name} is being changed, and AWS deletes it only when that has ended: waiting")
            wait_until_idle(self.backend, self.name, self.pace, self.say)
            self.backend.delete_endpoint(self.name)
        wait_until_gone(self.backend, self.name, self.pace, self.say)

    # -- what exists when something goes wrong ----------------------------------------------------------------------

    @contextmanager
    def reporting(self, doing: str) -> Iterator[Mark]:
        """Add to every error what exists and costs money, and how to delete it."""
        mark = Mark()
        try:
            yield mark
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted while {doing.lower()} {self.name}{self._describe(mark)}") from None
        except DreamBoothError as error:
            error.args = (f"{error}{self._describe(mark)}",)
            raise
        except Exception as error:  # a bug: the user must still learn what costs money
            if mark.exists or mark.may_exist:
                error.add_note(f"{self.name}{self._describe(mark)}")
            raise

    def _describe(self, mark: Mark) -> str:
        if not mark.exists and not mark.may_exist:
            return "; there is no endpoint, so nothing costs"
        state = "exists and may cost" if mark.exists else "may exist and cost"
        return (f"; the endpoint {state} money until it is deleted: repeat the command to go on, or type "
                f"{self.command(Action.delete)}")

    def command(self, action: Action) -> str:
        return quoting.command("deploy", {"action": action.value, "name": self.name})
