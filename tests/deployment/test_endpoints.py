"""Endpoints on SageMaker: created, updated, rolled back and deleted, on a service in memory, through every failure."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from dreambooth.deployment.options import Action
from dreambooth.errors import ConfigError, Interrupted, UserError
from tests.deployment.conftest import Console
from tests.deployment.endpoint_service import EndpointService, Refusal, lost_answer, network_failure

Run = Callable[..., None]
DELETE = "python -m dreambooth.deploy action=delete name=toy"
PING = ("The primary container for production variant main did not pass the ping health check. Please check CloudWatch "
        "logs for this endpoint.")
CAPACITY = ("Unable to provision requested ML compute capacity due to InsufficientInstanceCapacity error. Please retry "
            "using a different ML instance type or after some time.")


def interruption() -> BaseException:
    return KeyboardInterrupt()


def status_of(service: EndpointService) -> tuple[str, str]:
    found = service.endpoints["toy"]
    return found["status"], found["config"]


def test_an_endpoint_is_created_and_its_price_is_told_before(
        deploy: Run, service: EndpointService, console: Console) -> None:
    deploy()
    assert status_of(service) == ("InService", "toy-v1")
    assert [operation for operation, _ in service.calls if operation.startswith(("Create", "Update", "Delete"))] == [
        "CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
    assert "1 x ml.g4dn.xlarge at $0.7364/h: $0.7364 per hour, $538 per month" in console.text
    assert console.text.index("per month") < console.text.index("creating the endpoint")
    assert console.lines[-1].endswith(DELETE)
    assert service.tags["arn:aws:sagemaker:us-east-1:123456789012:endpoint-config/toy-v1"]["dreambooth:served"]


def test_repeating_the_command_makes_nothing_new(deploy: Run, service: EndpointService) -> None:
    deploy()
    first = len(service.calls)
    deploy()
    assert {operation for operation, _ in service.calls[first:]} <= {
        "DescribeEndpoint", "ListTags", "ListEndpointConfigs", "ListModels", "DescribeScalableTargets",
        "DescribeAlarms"}


def test_an_update_is_a_new_version_that_replaces_the_old_one_when_it_serves(
        deploy: Run, service: EndpointService, console: Console) -> None:
    deploy()
    deploy(environment={"DREAMBOOTH_SERVE_MAX_STEPS": "50"})
    assert status_of(service) == ("InService", "toy-v2")
    assert service.named("UpdateEndpoint") == [{"EndpointName": "toy", "EndpointConfigName": "toy-v2"}]
    assert set(service.configs) == {"toy-v1", "toy-v2"} == set(service.models)
    assert "toy-v1 serves until the new instances answer, and both are paid meanwhile" in console.text


def test_rollback_steps_back_through_the_versions_that_served(
        deploy: Run, service: EndpointService, console: Console) -> None:
    deploy()
    for seconds in ("10", "20"):
        deploy(environment={"X": seconds})
    service.outcome = PING
    with pytest.raises(UserError):
        deploy(environment={"X": "30"})  # toy-v4 never serves
    deploy(environment={"X": "40"})
    assert status_of(service) == ("InService", "toy-v5")
    for expected in ("toy-v3", "toy-v2", "toy-v1"):
        deploy(action=Action.rollback, run=None)
        assert status_of(service) == ("InService", expected)
    with pytest.raises(UserError, match="toy-v1 is the first version of toy that served: type to=NAME"):
        deploy(action=Action.rollback)
    deploy(action=Action.rollback, to="toy-v3")
    assert status_of(service) == ("InService", "toy-v3")
    for to in ("toy-v9", "nothing"):
        with pytest.raises(UserError, match=f"there is no version {to} of toy: type to= one of toy-v1, toy-v2"):
            deploy(action=Action.rollback, to=to)
    with pytest.raises(UserError, match="toy-v3 serves already"):
        deploy(action=Action.rollback, to="3")
    deploy(environment={"X": "50"})
    assert status_of(service) == ("InService", "toy-v6"), "numbers grow, whatever serves"
    console.lines.clear()
    deploy(action=Action.status)
    assert console.lines[:2] == ["toy  InService  toy-v6", "1 x ml.g4dn.xlarge, $0.7364 per hour"]
    assert "toy-v4  never served" in console.lines and "toy-v6  serves" in console.lines


def test_delete_removes_everything_that_has_the_tag_and_nothing_else(
        deploy: Run, service: EndpointService, console: Console) -> None:
    deploy(max_instances=3)
    deploy(max_instances=3, environment={"X": "1"})
    service._CreateModel("toy-v77", Tags=[])  # somebody else's
    deploy(action=Action.delete, run=None)
    assert (service.endpoints, service.configs, set(service.models)) == ({}, {}, {"toy-v77"})
    assert (service.targets, service.policies, service.alarms) == ({}, {}, {})
    assert "costs nothing any more" in console.text
    with pytest.raises(UserError, match="there is no endpoint toy of dreambooth in us-east-1"):
        deploy(action=Action.delete)


# -- autoscaling ----------------------------------------------------------------------------------------------------

def test_a_real_time_endpoint_follows_its_load_and_an_update_keeps_its_instances(
        deploy: Run, service: EndpointService, console: Console) -> None:
    deploy(max_instances=4, scale_target=3)
    [target] = service.targets.values()
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 4)
    assert "autoscaling: 1 to 4 instances, $0.7364 to $2.946 per hour" in console.text
    deploy(max_instances=4, scale_target=3, environment={"X": "1"})
    [update] = service.named("UpdateEndpoint")
    assert update["RetainAllVariantProperties"] is True
    assert "DeregisterScalableTarget" not in [operation for operation, _ in service.calls]


def test_another_instance_type_needs_autoscaling_to_be_removed_and_set_again(
        deploy: Run, service: EndpointService) -> None:
    deploy(max_instances=2)
    deploy(max_instances=2, instance="ml.g5.xlarge")
    assert status_of(service) == ("InService", "toy-v2")
    order = [operation for operation, _ in service.calls if operation in (
        "DeregisterScalableTarget", "UpdateEndpoint", "RegisterScalableTarget")]
    assert order == ["RegisterScalableTarget", "DeregisterScalableTarget", "UpdateEndpoint", "RegisterScalableTarget"]
    service.outcome = CAPACITY
    with pytest.raises(UserError, match="toy-v2 serves as before"):
        deploy(max_instances=3, instance="ml.g6.xlarge")
    assert [target["MaxCapacity"] for target in service.targets.values()] == [2], "that of the version that serves"
    deploy(action=Action.rollback)
    assert status_of(service)[1] == "toy-v1" and service.targets
    deploy()
    assert not service.targets, "the newest version asks for none"


def test_an_asynchronous_endpoint_scales_to_zero_and_wakes_up(
        deploy: Run, service: EndpointService, console: Console) -> None:
    deploy(kind="async", max_instances=2, error_topic="arn:aws:sns:us-east-1:123456789012:failures")
    [target] = service.targets.values()
    assert (target["MinCapacity"], target["MaxCapacity"]) == (0, 2)
    assert set(service.policies) == {"dreambooth-toy-load", "dreambooth-toy-wake"}
    [alarm] = service.alarms.values()
    assert alarm["MetricName"] == "HasBacklogWithoutCapacity"
    assert alarm["AlarmActions"][0].endswith("dreambooth-toy-wake")
    assert "without requests it costs nothing" in console.text
    deploy(kind="async", max_instances=2, environment={"X": "1"})
    assert "RetainAllVariantProperties" not in service.named("UpdateEndpoint")[0], "one instance must prove the update"
    with pytest.raises(UserError, match="the endpoint toy has kind=async, and its clients expect answers of this kind"):
        deploy()
    deploy(action=Action.delete)
    assert not service.alarms and not service.targets


def test_autoscaling_of_others_is_kept(deploy: Run, service: EndpointService) -> None:
    deploy()
    service._RegisterScalableTarget("endpoint/toy/variant/main", MinCapacity=1, MaxCapacity=9)
    deploy()
    assert service.targets
    with pytest.raises(UserError, match="the autoscaling of toy was not registered by dreambooth and is kept"):
        deploy(max_instances=2)
    deploy(action=Action.delete)
    assert service.targets and not service.endpoints


# -- prices ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, sentence", [
    ({"max_usd_hour": 0.5}, "1 x ml.g4dn.xlarge costs $0.7364 per hour, above max_usd_hour=0.5"),
    ({"max_usd_hour": 1, "max_instances": 4}, "autoscaling may run 4 x ml.g4dn.xlarge, $2.946 per hour, above max_"),
    ({"max_usd_hour": 1, "instance": "ml.p3.2xlarge"}, "the price of ml.p3.2xlarge is not known"),
    ({"max_usd_hour": 1, "instance": "ml.p3.2xlarge", "price_usd_hour": 3.8}, "1 x ml.p3.2xlarge costs $3.8 per hour"),
])
def test_an_endpoint_above_the_price_is_refused_before_anything_exists(
        options: dict[str, Any], sentence: str, deploy: Run, service: EndpointService) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        deploy(**options)
    assert not service.calls


def test_a_rollback_above_the_price_is_refused(deploy: Run, service: EndpointService) -> None:
    deploy(instance="ml.g5.xlarge")
    deploy()
    with pytest.raises(ConfigError, match=r"toy-v1 costs up to \$1.408 per hour, and max_usd_hour=1"):
        deploy(action=Action.rollback, max_usd_hour=1)
    assert status_of(service) == ("InService", "toy-v2")


# -- failures of AWS ------------------------------------------------------------------------------------------------

EXPIRED = ("ExpiredTokenException", "The security token included in the request is expired")
DENIED = ("AccessDeniedException", "not authorized")
QUOTA = ("ResourceLimitExceeded", "The account-level service limit 'ml.g4dn.xlarge for endpoint usage' is 0 Instances")
STEPS = ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"]


@pytest.mark.parametrize("operation", [*STEPS, "DescribeEndpoint", "ListTags", "AddTags", "RegisterScalableTarget",
                                       "PutScalingPolicy"])
@pytest.mark.parametrize("kind", ["throttled", "network", "lost"])
def test_a_short_failure_at_any_step_is_no_failure(
        operation: str, kind: str, deploy: Run, service: EndpointService) -> None:
    """A call that is throttled, or whose answer is lost after it took effect, is repeated and makes nothing twice."""
    error = {"throttled": lambda: Refusal("ThrottlingException", "Rate exceeded"), "network": network_failure,
             "lost": lost_answer}[kind]
    service.fail(operation, error, after=kind == "lost")
    deploy(max_instances=2)
    assert status_of(service) == ("InService", "toy-v1")
    assert len(service.models) == len(service.configs) == len(service.targets) == 1


@pytest.mark.parametrize("operation", STEPS)
@pytest.mark.parametrize("code, message, sentence", [
    (*QUOTA, "a quota of the account is used up"), (*DENIED, "no permission for sagemaker:{} on toy"),
    ("ValidationException", "1 validation error detected", "sagemaker:{} on toy"),
    (*EXPIRED, "the AWS login has expired (ExpiredTokenException): set AWS_ACCESS_KEY_ID")])
def test_a_refusal_at_any_step_is_one_sentence_and_the_repeated_command_completes(
        operation: str, code: str, message: str, sentence: str, deploy: Run, service: EndpointService) -> None:
    service.fail(operation, lambda: Refusal(code, message))
    with pytest.raises(UserError) as caught:
        deploy()
    text = str(caught.value)
    assert text.startswith(sentence.format(operation)) and "\n" not in text
    assert text.endswith("; there is no endpoint, so nothing costs")
    deploy()
    assert status_of(service) == ("InService", "toy-v1")
    assert set(service.models) == {"toy-v1"} == set(service.configs)


def test_a_network_that_stays_down_after_the_creation_was_sent_tells_that_it_may_exist(
        deploy: Run, service: EndpointService) -> None:
    service.fail("CreateEndpoint", lost_answer, after=True)
    service.fail("CreateEndpoint", network_failure, times=9)
    with pytest.raises(UserError) as caught:
        deploy()
    assert "AWS did not answer sagemaker:CreateEndpoint on toy" in str(caught.value)
    assert str(caught.value).endswith(
        f"; the endpoint may exist and cost money until it is deleted: repeat the command to go on, or type {DELETE}")
    service.faults.clear()
    deploy()
    assert status_of(service) == ("InService", "toy-v1")


@pytest.mark.parametrize("reason, sentence", [
    (CAPACITY, "AWS has no free instances of this type now: repeat the command later, or type another instance=TYPE"),
    (PING, "the container does not answer: type aws logs tail /aws/sagemaker/Endpoints/toy"),
    ("The repository of your image does not grant ecr:GetDownloadUrlForLayer", "must be allowed to pull the image"),
    ("Failed to download model data for container \"container_1\" from URL", "must be allowed to read the model in S3"),
    ("Something new.", "Something new; the endpoint exists")])
def test_an_endpoint_that_fails_is_explained_and_the_repeated_command_replaces_it(
        reason: str, sentence: str, deploy: Run, service: EndpointService, console: Console) -> None:
    service.outcome = reason
    with pytest.raises(UserError) as caught:
        deploy()
    assert sentence in str(caught.value) and str(caught.value).endswith(DELETE)
    assert status_of(service)[0] == "Failed"
    deploy()
    assert status_of(service) == ("InService", "toy-v1")
    assert "it is deleted and created again" in console.text


@pytest.mark.parametrize("reason", [CAPACITY, PING])
def test_an_update_that_fails_leaves_the_old_version_and_can_be_repeated(
        reason: str, deploy: Run, service: EndpointService) -> None:
    deploy()
    service.outcome = reason
    with pytest.raises(UserError, match="the update of toy failed and toy-v1 serves as before: ") as caught:
        deploy(environment={"X": "1"})
    assert DELETE in str(caught.value)
    deploy(environment={"X": "1"})
    assert status_of(service) == ("InService", "toy-v2")
    assert len(service.named("CreateModel")) == 2 + 1, "the model of the repeated command exists already"


def test_a_lost_answer_of_an_update_is_no_failure(deploy: Run, service: EndpointService) -> None:
    deploy()
    service.fail("UpdateEndpoint", lost_answer, after=True)
    deploy(environment={"X": "1"})
    assert status_of(service) == ("InService", "toy-v2")


def test_an_endpoint_that_another_command_changes_is_left_alone(deploy: Run, service: EndpointService) -> None:
    deploy()
    service.steps = 99
    service._UpdateEndpoint("toy", "toy-v1")
    service.endpoints["toy"]["pending"] = "other"
    for action, sentence in ((Action.deploy, "toy is Updating, to other: repeat the command when it is done"),
                             (Action.rollback, "toy is Updating: it can be rolled back when it is InService")):
        with pytest.raises(UserError, match=sentence):
            deploy(action=action, environment={"X": "1"})
    assert not service.named("UpdateEndpoint")


def test_a_command_that_was_killed_while_it_waited_is_repeated_to_follow(deploy: Run, service: EndpointService) -> None:
    service.steps = 20

    def killed() -> None:
        raise KeyboardInterrupt

    service.on_describe = lambda: killed() if service.endpoints else None
    with pytest.raises(Interrupted) as caught:
        deploy()
    assert str(caught.value).startswith("interrupted while creating toy; the endpoint exists and may cost money")
    assert str(caught.value).endswith(DELETE) and caught.value.exit_code == 5
    service.on_describe = lambda: None
    deploy()
    assert status_of(service) == ("InService", "toy-v1")
    assert len(service.named("CreateEndpoint")) == 1


def test_ctrl_c_before_anything_costs_says_so(deploy: Run, service: EndpointService) -> None:
    service.fail("CreateModel", interruption)
    with pytest.raises(Interrupted, match="interrupted while creating toy; there is no endpoint, so nothing costs"):
        deploy()


def test_waiting_has_a_deadline_and_survives_a_silent_network(
        deploy: Run, service: EndpointService, console: Console) -> None:
    service.steps = 12
    service.fail("DescribeEndpoint", lambda: Refusal("ValidationException", "Could not find endpoint"))
    service.fail("DescribeEndpoint", network_failure, times=20)
    deploy()
    assert console.text.count("AWS does not answer (EndpointConnectionError); trying again") == 1
    assert re.search(r"toy  Creating  \d min, about \$0.0\d so far", console.text)
    deploy(action=Action.delete)
    service.steps = 10**6
    with pytest.raises(UserError, match="still Creating after 60 minutes: repeat the command to follow it further; the "
                                        "endpoint exists"):
        deploy()
    with pytest.raises(UserError, match="still Creating after 60 minutes"):
        deploy(action=Action.delete)
    service.endpoints["toy"]["left"] = service.steps = 3
    deploy(action=Action.delete)
    assert not service.endpoints
    assert "AWS deletes it only when that has ended: waiting" in console.text


def test_an_endpoint_of_somebody_else_is_never_touched(deploy: Run, service: EndpointService) -> None:
    deploy()
    service.tags[service.endpoints["toy"]["arn"]].clear()
    before = {**service.endpoints}
    for action in Action:
        with pytest.raises(UserError, match=r"was not created by dreambooth \(it has no tag dreambooth:endpoint=toy\)"):
            deploy(action=action, environment={"X": "1"})
    assert service.endpoints == before and set(service.configs) == {"toy-v1"}


@pytest.mark.parametrize("action", [Action.status, Action.rollback])
def test_a_missing_endpoint_is_one_sentence(action: Action, deploy: Run, service: EndpointService) -> None:
    with pytest.raises(UserError, match="there is no endpoint toy in us-east-1: type another name=NAME"):
        deploy(action=action)


def test_a_deletion_without_permission_for_autoscaling_still_ends_the_cost(
        deploy: Run, service: EndpointService) -> None:
    deploy(max_instances=2)
    service.fail("DescribeScalableTargets", lambda: Refusal(*DENIED))
    with pytest.raises(UserError, match="no permission for application-autoscaling:DescribeScalableTargets") as caught:
        deploy(action=Action.delete)
    assert "docs/deployment.md has the complete policy" in str(caught.value)
    assert not service.endpoints and not service.configs
