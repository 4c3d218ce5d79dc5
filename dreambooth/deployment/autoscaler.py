"""Registers, changes and removes the autoscaling of an endpoint, and the alarm that wakes an endpoint from zero."""

from dataclasses import dataclass
from typing import Any

from dreambooth.deployment import scaling as requests
from dreambooth.deployment.endpoint_backend import call_service
from dreambooth.deployment.endpoint_requests import OWNER_TAG, Scaling
from dreambooth.errors import UserError
from dreambooth.storage import aws_errors, folders

FOREIGN = "the autoscaling of {} was not registered by dreambooth"
KEPT = FOREIGN + " and is kept: type max_instances=null, or deregister it first"


@dataclass(frozen=True)
class Registered:
    """The autoscaling that an endpoint has."""

    greatest: int  # number of instances
    is_own: bool  # whether this package has registered it


class Autoscaler:
    """Application Auto Scaling and CloudWatch. Every call sets a state, so repeating a call does no harm.

    Clients are created when they are needed: an endpoint without autoscaling needs no permission for these services,
    except to look whether it has any.
    """

    def __init__(self, scaling_client: Any | None = None, alarm_client: Any | None = None) -> None:
        self._is_own_client = scaling_client is None
        self._scaling_client = scaling_client or folders.client("application-autoscaling")
        self._own_alarm_client = alarm_client

    def renew_login(self) -> None:
        """Create the clients again, because a boto3 client keeps the credentials that it has read once."""
        if self._is_own_client:
            self._scaling_client, self._own_alarm_client = folders.client("application-autoscaling"), None

    @property
    def _alarm_client(self) -> Any:
        if self._own_alarm_client is None:
            self._own_alarm_client = folders.client("cloudwatch")
        return self._own_alarm_client

    def find(self, endpoint: str) -> Registered | None:
        """Return the autoscaling of the endpoint, from whomever; None if it has none."""
        target = self._find_target(endpoint)
        if target is None:
            return None
        return Registered(target["MaxCapacity"], self._is_owned(target, endpoint))

    def apply(self, endpoint: str, scaling: Scaling | None) -> None:
        """Give an endpoint in service the autoscaling that a version asks for; None: remove it.

        Raises:
            UserError: AWS rejects a request. The endpoint serves with the number of instances that it has.
        """
        if scaling is None:
            self.remove(endpoint)
            return
        self._register(endpoint, scaling)
        policy = requests.build_policy(endpoint, scaling)
        call_service("application-autoscaling:PutScalingPolicy", endpoint,
                     lambda: self._scaling_client.put_scaling_policy(**policy))
        if scaling.least == 0:
            wake = requests.build_wake_policy(endpoint)
            arn = call_service("application-autoscaling:PutScalingPolicy", endpoint,
                               lambda: self._scaling_client.put_scaling_policy(**wake))["PolicyARN"]
            alarm = requests.build_wake_alarm(endpoint, arn)
            call_service("cloudwatch:PutMetricAlarm", endpoint, lambda: self._alarm_client.put_metric_alarm(**alarm))

    def _register(self, endpoint: str, scaling: Scaling) -> None:
        target = self._find_target(endpoint)
        if target is not None and not self._is_owned(target, endpoint):
            raise UserError(KEPT.format(endpoint))

        def register(is_new: bool) -> None:
            request = requests.build_target(endpoint, scaling, is_new)
            call_service("application-autoscaling:RegisterScalableTarget", endpoint,
                         lambda: self._scaling_client.register_scalable_target(**request))

        try:
            register(is_new=target is None)
        except UserError:
            if target is not None or self._find_target(endpoint) is None:
                raise
            register(is_new=False)  # the answer to the first attempt was lost, and AWS then accepts no tags

    def remove(self, endpoint: str) -> bool:
        """Remove the autoscaling of an endpoint, with its policies and alarms. Return whether there was any.

        Autoscaling that others have registered is kept.
        """
        target = self._find_target(endpoint)
        if target is not None and not self._is_owned(target, endpoint):
            return False
        self._delete_alarm(endpoint)
        if target is None:
            return False
        try:  # AWS also deletes the policies, and the alarms that it has made itself
            call_service("application-autoscaling:DeregisterScalableTarget", endpoint,
                         lambda: self._scaling_client.deregister_scalable_target(**requests.target_of(endpoint)))
        except UserError as error:
            if error.__cause__ is None or aws_errors.error_code(error.__cause__) != "ObjectNotFoundException":
                raise
        return True

    def _find_target(self, endpoint: str) -> dict[str, Any] | None:
        found = call_service("application-autoscaling:DescribeScalableTargets", endpoint,
                             lambda: self._scaling_client.describe_scalable_targets(
                                 ServiceNamespace=requests.NAMESPACE, ResourceIds=[requests.resource_id(endpoint)],
                                 ScalableDimension=requests.DIMENSION))["ScalableTargets"]
        return next(iter(found), None)

    def _is_owned(self, target: dict[str, Any], endpoint: str) -> bool:
        arn = target.get("ScalableTargetARN")
        if not arn:
            return False
        tags = call_service("application-autoscaling:ListTagsForResource", endpoint,
                            lambda: self._scaling_client.list_tags_for_resource(ResourceARN=arn))["Tags"]
        return bool(tags.get(OWNER_TAG) == endpoint)

    def _delete_alarm(self, endpoint: str) -> None:
        name = requests.wake_name(endpoint)
        alarms = call_service("cloudwatch:DescribeAlarms", name, lambda: self._alarm_client.describe_alarms(
            AlarmNames=[name]))["MetricAlarms"]
        if alarms and alarms[0].get("AlarmDescription") == f"{OWNER_TAG}={endpoint}":
            call_service("cloudwatch:DeleteAlarms", name, lambda: self._alarm_client.delete_alarms(AlarmNames=[name]))
