"""The budget of an endpoint: checked against its price, and kept by the command, which deletes the endpoint."""

from collections.abc import Callable
from typing import Any

import pytest

from dreambooth.config.hardware import Budget
from dreambooth.deployment.autoscaler import Autoscaler
from dreambooth.deployment.endpoint_backend import EndpointBackend
from dreambooth.errors import ConfigError, Interrupted, UserError
from dreambooth.storage import folders
from tests.deployment.conftest import Console
from tests.deployment.endpoint_service import EndpointService, expired_login, network_failure

Run = Callable[..., None]


@pytest.mark.parametrize("limits, hours, line", [
    ({"max_hours": 2.0}, 2.0, "budget.max_hours=2 lasts for 2.0 h of serving"),
    ({"max_usd": 0.7364}, 1.0, "budget.max_usd=0.7364 lasts for 1.0 h of serving")])
def test_an_endpoint_is_deleted_when_its_budget_is_used_up(
        limits: dict[str, float], hours: float, line: str, deploy: Run, service: EndpointService,
        console: Console) -> None:
    service.faults["DescribeEndpoint"] = []
    deploy(budget=Budget(**limits))
    assert not service.endpoints and not service.configs and not service.models
    assert 0.9 * hours * 3600 < console.seconds < hours * 3600 + 120
    assert line in console.text and "is used up" in console.text and "endpoint toy deleted" in console.text


def test_a_budget_that_the_price_passes_is_refused_before_anything_exists(
        deploy: Run, service: EndpointService) -> None:
    for options, message in (
            ({"budget": Budget(5.0, 24.0)}, r"24 h of 1 x ml.g4dn.xlarge cost up to \$17.67, and budget.max_usd=5"),
            ({"budget": Budget(5.0), "instance": "ml.p3.2xlarge"}, "price of ml.p3.2xlarge is not known, so budget")):
        with pytest.raises(ConfigError, match=message):
            deploy(**options)
    assert not service.calls


def test_a_command_that_ends_early_says_that_the_endpoint_goes_on(
        deploy: Run, service: EndpointService, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    deploy()
    monkeypatch.setattr(console, "sleep", interrupt)
    with pytest.raises(Interrupted, match="while watching the budget of toy; the endpoint exists and may cost money"):
        deploy(budget=Budget(None, 1.0))
    assert service.endpoints


def fail_while_watching(service: EndpointService, error: Callable[[], BaseException], times: int) -> None:
    """Let the endpoint be described 20 times, and then fail `times` times."""
    calls: list[Any] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 20:
            service.fail("DescribeEndpoint", error, times=times)

    service.on_describe = fail


def test_a_silent_aws_does_not_end_the_budget(deploy: Run, service: EndpointService, console: Console) -> None:
    deploy()
    fail_while_watching(service, network_failure, times=30)
    deploy(budget=Budget(None, 1.0))
    assert not service.endpoints


def test_an_expired_login_is_renewed_and_the_budget_is_kept(
        deploy: Run, service: EndpointService, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint would cost money without limit if the command ended with the login."""
    deploy()
    renewed: list[str] = []
    monkeypatch.setattr(EndpointBackend, "renew_login", lambda self: renewed.append("endpoints"))
    monkeypatch.setattr(Autoscaler, "renew_login", lambda self: renewed.append("autoscaling"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    service.fail("DeleteEndpoint", expired_login, times=2)
    fail_while_watching(service, expired_login, times=3)
    deploy(budget=Budget(None, 1.0))
    assert not service.endpoints
    assert renewed == ["endpoints"] * 3 + ["endpoints", "autoscaling"] * 2
    assert console.text.count("until then the budget is counted, but toy cannot be deleted") == 1
    assert console.text.count("log in there as you did before; deleting toy again in 15 s") == 2


def test_clients_are_created_again_for_another_login(monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[str] = []
    monkeypatch.setattr(folders, "client", lambda service: created.append(service) or object())
    own, given = (EndpointBackend(), Autoscaler()), (EndpointBackend(object()), Autoscaler(object(), object()))
    before = own[0]._client, own[1]._scaling_client, own[1]._alarm_client
    kept = given[0]._client, given[1]._scaling_client, given[1]._alarm_client
    for service in (*own, *given):
        service.renew_login()
    after = own[0]._client, own[1]._scaling_client, own[1]._alarm_client
    assert not set(before) & set(after) and created[:3] == ["sagemaker", "application-autoscaling", "cloudwatch"]
    assert (given[0]._client, given[1]._scaling_client, given[1]._alarm_client) == kept


def test_an_expired_login_in_environment_variables_ends_the_command(
        deploy: Run, service: EndpointService, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    service.fail("DeleteEndpoint", expired_login, times=2)
    with pytest.raises(UserError, match="the AWS login has expired"):
        deploy(budget=Budget(None, 1.0))
    assert service.endpoints


@pytest.mark.parametrize("after", [False, True])
def test_a_deletion_that_aws_does_not_answer_is_repeated(
        after: bool, deploy: Run, service: EndpointService, console: Console) -> None:
    service.fail("DeleteEndpoint", network_failure, times=5, after=after)
    deploy(budget=Budget(None, 1.0))
    assert not service.endpoints and not service.configs and not service.models
    assert "deleting toy again in 15 s" in console.text
