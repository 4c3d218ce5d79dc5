"""Endpoints on SageMaker: created, updated, rolled back and deleted, on a service in memory."""

import itertools
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreambooth.deployment import endpoint_changes
from dreambooth.deployment.options import Action
from dreambooth.errors import ConfigError, UserError
from tests.deployment.conftest import Console
from tests.deployment.endpoint_service import EndpointService

Run = Callable[..., None]
DELETE = "python -m dreambooth.deploy action=delete name=toy"
PING = ("The primary container for production variant main did not pass the ping health check. Please check CloudWatch "
        "logs for this endpoint.")
CAPACITY = ("Unable to provision requested ML compute capacity due to InsufficientInstanceCapacity error. Please retry "
            "using a different ML instance type or after some time.")


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


def test_a_request_that_aws_would_reject_later_is_refused_before_anything_exists(
        deploy: Run, service: EndpointService) -> None:
    with pytest.raises(ConfigError, match="Alarms"):
        deploy(rollback_alarms=[f"alarm{number}" for number in range(11)])
    assert not service.calls


def test_settings_that_are_served_already_are_told(deploy: Run, service: EndpointService, console: Console) -> None:
    """An image with a moving tag, or a folder in S3 with new files, is no change of the settings."""
    deploy()
    assert "nothing is updated" not in console.text
    deploy()
    assert "nothing is updated: toy serves these settings already" in console.text


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


def test_rollback_returns_to_the_version_that_served_last(
        deploy: Run, service: EndpointService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version from which somebody has gone back is not the target of the next rollback."""
    hours = itertools.count()
    start = datetime(2026, 11, 29, tzinfo=UTC)
    monkeypatch.setattr(endpoint_changes, "datetime", SimpleNamespace(
        now=lambda zone: start + timedelta(hours=next(hours))))
    deploy()
    for seconds, last in (("10", "toy-v1"), ("20", "toy-v1")):
        deploy(environment={"X": seconds})
        deploy(action=Action.rollback)
        assert status_of(service) == ("InService", last)
    deploy(action=Action.rollback, to="toy-v2")
    deploy(environment={"X": "30"})
    deploy(action=Action.rollback)
    assert status_of(service) == ("InService", "toy-v2"), "the one that was chosen last"
    deploy(action=Action.rollback)
    assert status_of(service) == ("InService", "toy-v1")


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


def test_autoscaling_of_others_is_kept(deploy: Run, service: EndpointService, console: Console) -> None:
    deploy()
    service._RegisterScalableTarget("endpoint/toy/variant/main", MinCapacity=1, MaxCapacity=9)
    deploy()
    assert service.targets
    for options, sentence in (
            ({"max_instances": 2}, "the autoscaling of toy was not registered by dreambooth and is kept"),
            ({"instance": "ml.g5.xlarge"}, "AWS refuses another instance type as long as it exists: type instance=ml"),
            ({"max_usd_hour": 6}, r"may run 9 x ml.g4dn.xlarge, \$6.628 per hour, above max_usd_hour=6: type a")):
        with pytest.raises(UserError, match=sentence):
            deploy(environment={"X": "1"}, **options)
    assert set(service.models) == {"toy-v1"} and not service.named("UpdateEndpoint"), "nothing was created"
    deploy(environment={"X": "1"})
    assert service.named("UpdateEndpoint")[0]["RetainAllVariantProperties"] is True, "the number of instances is theirs"
    with pytest.raises(UserError, match=r"may run 9 x ml\.g4dn\.xlarge"):
        deploy(action=Action.rollback, max_usd_hour=6)
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


def test_a_typed_price_counts_for_status_and_rollback(deploy: Run, service: EndpointService, console: Console) -> None:
    unknown = {"instance": "ml.p3.2xlarge"}
    deploy(**unknown, max_instances=3)
    deploy(**unknown, environment={"X": "1"})
    for action, sentence in ((Action.status, "1 x ml.p3.2xlarge, price unknown: type price_usd_hour=PRICE"),
                             (Action.rollback, "toy-v1: 1 x ml.p3.2xlarge, $3.8 per hour")):
        deploy(action=action, price_usd_hour=None if action is Action.status else 3.8)
        assert sentence in console.lines
    deploy(action=Action.status, price_usd_hour=3.8)
    assert console.lines[-3] == "1 x ml.p3.2xlarge, $3.8 per hour"
    with pytest.raises(ConfigError, match=r"price of ml.p3.2xlarge is not known, .*: type price_usd_hour=PRICE"):
        deploy(action=Action.rollback, to="toy-v2", max_usd_hour=20)
    deploy(action=Action.rollback, to="toy-v2", max_usd_hour=4, price_usd_hour=3.8)
    with pytest.raises(ConfigError, match=r"toy-v1 costs up to \$11.4 per hour, and max_usd_hour=10: type a higher"):
        deploy(action=Action.rollback, max_usd_hour=10, price_usd_hour=3.8)
    assert status_of(service) == ("InService", "toy-v2")


@pytest.mark.slow
def test_the_defaults_files_of_the_company_are_used_and_told(
        deploy: Run, service: EndpointService, console: Console, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(DEFAULTS)
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(file))
    deploy(role=None, instance="ml.m5.xlarge", price_usd_hour=0.23)
    [model], [config], [endpoint] = (service.named(f"Create{kind}") for kind in ("Model", "EndpointConfig", "Endpoint"))
    assert model["ExecutionRoleArn"].endswith("role/company") and model["EnableNetworkIsolation"] is True
    assert model["VpcConfig"]["Subnets"] == ["subnet-0123456789abcdef0"]
    assert config["KmsKeyId"].endswith("key/1")
    for request in (model, config, endpoint):
        assert {"Key": "team", "Value": "art"} in request["Tags"]
    assert "from the defaults of the SageMaker SDK: Tags.team=art" in console.lines


DEFAULTS = """
SchemaVersion: '1.0'
SageMaker:
  Model:
    ExecutionRoleArn: arn:aws:iam::123456789012:role/company
    EnableNetworkIsolation: true
    VpcConfig:
      Subnets: [subnet-0123456789abcdef0]
      SecurityGroupIds: [sg-0123456789abcdef0]
  EndpointConfig:
    KmsKeyId: arn:aws:kms:us-east-1:123456789012:key/1
    Tags:
    - {Key: team, Value: art}
"""
