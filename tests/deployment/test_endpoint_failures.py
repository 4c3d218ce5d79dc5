"""Endpoints on SageMaker through every failure that AWS can answer, on a service in memory."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from dreambooth.deployment.options import Action
from dreambooth.errors import Interrupted, UserError
from tests.deployment.conftest import Console
from tests.deployment.endpoint_service import EndpointService, Refusal, lost_answer, network_failure
from tests.deployment.test_endpoints import CAPACITY, PING, status_of

Run = Callable[..., None]
DELETE = "python -m dreambooth.deploy action=delete name=toy"


def interruption() -> BaseException:
    return KeyboardInterrupt()


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


@pytest.mark.parametrize("error", [lambda: Refusal(*QUOTA), lambda: Refusal(*DENIED), lambda: Refusal(*EXPIRED),
                                   lambda: Refusal("ValidationException", "1 validation error"), interruption])
@pytest.mark.parametrize("options", [{"instance": "ml.g5.xlarge", "max_instances": 2}, {}])
def test_an_update_that_is_refused_at_once_leaves_the_autoscaling(
        error: Callable[[], BaseException], options: dict[str, Any], deploy: Run, service: EndpointService) -> None:
    deploy(max_instances=4)
    before = [*service.targets.values()], {**service.policies}
    service.fail("UpdateEndpoint", error)
    with pytest.raises((UserError, Interrupted)):
        deploy(**options)
    assert status_of(service) == ("InService", "toy-v1")
    assert ([*service.targets.values()], service.policies) == before
    deploy(**options)
    assert status_of(service) == ("InService", "toy-v2") and len(service.targets) == len(options) // 2


def test_autoscaling_that_cannot_be_set_again_is_told(deploy: Run, service: EndpointService, console: Console) -> None:
    deploy(max_instances=4)
    service.fail("UpdateEndpoint", lambda: Refusal(*QUOTA))
    service.fail("RegisterScalableTarget", lambda: Refusal(*DENIED))
    with pytest.raises(UserError, match="a quota of the account is used up"):
        deploy(max_instances=2, instance="ml.g5.xlarge")
    assert "toy-v1 serves without its autoscaling, which could not be set again: repeat the command" in console.text


def test_an_interrupted_update_that_has_started_is_left_to_the_repeated_command(
        deploy: Run, service: EndpointService) -> None:
    deploy(max_instances=4)
    service.steps = 99
    service.fail("UpdateEndpoint", interruption, after=True)
    with pytest.raises(Interrupted, match="the endpoint exists and may cost money"):
        deploy(max_instances=2, instance="ml.g5.xlarge")
    assert service.endpoints["toy"]["pending"] == "toy-v2" and not service.targets
    service.endpoints["toy"]["left"] = 1
    deploy(max_instances=2, instance="ml.g5.xlarge")
    assert [target["MaxCapacity"] for target in service.targets.values()] == [2]


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


def test_an_endpoint_between_two_versions_can_be_updated_and_one_out_of_service_cannot(
        deploy: Run, service: EndpointService) -> None:
    deploy()
    service.endpoints["toy"] |= {"status": "OutOfService", "reason": "maintenance"}
    with pytest.raises(UserError, match=f"is OutOfService and serves nothing: maintenance; type {DELETE}, then this"):
        deploy(environment={"X": "1"})
    service.endpoints["toy"] |= {"status": "UpdateRollbackFailed", "reason": "both failed"}
    with pytest.raises(UserError, match="is UpdateRollbackFailed and serves two versions at a time: both failed"):
        deploy(action=Action.rollback)
    deploy(environment={"X": "1"})
    assert status_of(service) == ("InService", "toy-v2")


def test_an_endpoint_that_disappears_while_it_is_followed_is_told(deploy: Run, service: EndpointService) -> None:
    service.steps = 99
    service.on_describe = lambda: service.endpoints.clear() if len(service.named("DescribeEndpoint")) > 3 else None
    with pytest.raises(UserError, match="the endpoint toy was deleted meanwhile: repeat the command to create"):
        deploy()


def test_two_commands_at_the_same_time_do_not_mix_their_versions(
        deploy: Run, service: EndpointService, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other command makes toy-v1 between the list of versions and the creation of the model."""
    tags = [{"Key": "dreambooth:endpoint", "Value": "toy"}, {"Key": "dreambooth:digest", "Value": "other"}]
    answer = service._ListModels

    def list_then_create(**request: Any) -> dict[str, Any]:
        found = answer(**request)
        if not service.models:
            service._CreateModel("toy-v1", Tags=tags)
        return found

    monkeypatch.setattr(service, "_ListModels", list_then_create)
    with pytest.raises(UserError, match="toy-v1 exists and was made from other settings"):
        deploy()
    deploy()
    assert status_of(service) == ("InService", "toy-v2")


def test_a_version_of_somebody_else_is_not_used(deploy: Run, service: EndpointService) -> None:
    service._CreateModel("toy-v1", Tags=[])
    with pytest.raises(UserError, match="toy-v1 was not created by dreambooth for the endpoint toy: type another name"):
        deploy()


@pytest.mark.parametrize("action, serves", [(Action.deploy, "toy-v3"), (Action.rollback, "toy-v1")])
def test_an_endpoint_whose_instances_change_is_waited_for(
        action: Action, serves: str, deploy: Run, service: EndpointService, console: Console) -> None:
    """Autoscaling sets the state Updating too, and AWS then refuses an update."""
    deploy()
    deploy(environment={"X": "1"})
    service.endpoints["toy"] |= {"status": "Updating", "left": 3}
    deploy(action=action, environment={"X": "2"})
    assert status_of(service) == ("InService", serves)
    assert "toy is Updating: AWS changes its instances; waiting until that has ended" in console.lines
