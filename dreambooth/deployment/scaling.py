"""Autoscaling of an endpoint by Application Auto Scaling: builds its requests."""

from typing import Any

from dreambooth.deployment.endpoint_requests import OWNER_TAG, VARIANT, Scaling

NAMESPACE, DIMENSION = "sagemaker", "sagemaker:variant:DesiredInstanceCount"
METRICS = {"concurrency": "SageMakerVariantConcurrentRequestsPerModelHighResolution",
           "invocations": "SageMakerVariantInvocationsPerInstance"}  # metric -> Application Auto Scaling's name of it
OUT_SECONDS = 60  # pause after instances were added, before more are added
WAKE_SECONDS = 300  # the same after the first instance: it needs minutes to start


def target_of(endpoint: str) -> dict[str, str]:
    """Return the arguments that identify the scalable target of an endpoint: the instances of its variant."""
    return {"ServiceNamespace": NAMESPACE, "ResourceId": resource_id(endpoint), "ScalableDimension": DIMENSION}


def resource_id(endpoint: str) -> str:
    return f"endpoint/{endpoint}/variant/{VARIANT}"


def build_target(endpoint: str, scaling: Scaling, is_new: bool) -> dict[str, Any]:
    """Return the request of RegisterScalableTarget, which also changes the limits of a registered target.

    Args:
        is_new: whether the target is not registered yet. AWS accepts tags only when a target is registered.
    """
    tags = {"Tags": {OWNER_TAG: endpoint}} if is_new else {}
    return {**target_of(endpoint), "MinCapacity": scaling.least, "MaxCapacity": scaling.greatest, **tags}


def policy_name(endpoint: str) -> str:
    return f"dreambooth-{endpoint}-load"


def wake_name(endpoint: str) -> str:
    """Return the name of the policy that starts the first instance, and of the alarm that triggers it."""
    return f"dreambooth-{endpoint}-wake"


def build_policy(endpoint: str, scaling: Scaling) -> dict[str, Any]:
    """Return the request of PutScalingPolicy that keeps the load of each instance near scaling.target."""
    if scaling.metric == "backlog":
        metric: dict[str, Any] = {"CustomizedMetricSpecification": {
            "MetricName": "ApproximateBacklogSizePerInstance", "Namespace": "AWS/SageMaker",
            "Dimensions": [{"Name": "EndpointName", "Value": endpoint}], "Statistic": "Average"}}
    else:
        metric = {"PredefinedMetricSpecification": {"PredefinedMetricType": METRICS[scaling.metric]}}
    return {**target_of(endpoint), "PolicyName": policy_name(endpoint), "PolicyType": "TargetTrackingScaling",
            "TargetTrackingScalingPolicyConfiguration": {
                **metric, "TargetValue": scaling.target, "ScaleInCooldown": scaling.idle_seconds,
                "ScaleOutCooldown": OUT_SECONDS}}


def build_wake_policy(endpoint: str) -> dict[str, Any]:
    """Return the request of PutScalingPolicy that starts one instance when requests wait and no instance runs.

    The backlog per instance, which the other policy follows, does not exist without instances.
    """
    return {**target_of(endpoint), "PolicyName": wake_name(endpoint), "PolicyType": "StepScaling",
            "StepScalingPolicyConfiguration": {
                "AdjustmentType": "ChangeInCapacity", "MetricAggregationType": "Average", "Cooldown": WAKE_SECONDS,
                "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}]}}


def build_wake_alarm(endpoint: str, policy_arn: str) -> dict[str, Any]:
    """Return the request of PutMetricAlarm for the alarm that triggers the policy of `build_wake_policy`."""
    return {"AlarmName": wake_name(endpoint), "AlarmDescription": f"{OWNER_TAG}={endpoint}",
            "Namespace": "AWS/SageMaker", "MetricName": "HasBacklogWithoutCapacity", "Statistic": "Average",
            "Dimensions": [{"Name": "EndpointName", "Value": endpoint}], "Period": 60, "EvaluationPeriods": 2,
            "DatapointsToAlarm": 2, "Threshold": 1.0, "ComparisonOperator": "GreaterThanOrEqualToThreshold",
            "TreatMissingData": "missing", "AlarmActions": [policy_arn]}
