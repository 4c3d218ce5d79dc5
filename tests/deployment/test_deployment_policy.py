"""The IAM policy of docs/deployment.md allows what `deploy` calls, and no more."""

import json
import re
from typing import Any

from tests.cloud.jobs import ROOT
from tests.cloud.test_permissions import S3_CALLS

CODE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "dreambooth/deployment").glob("*.py")))
SERVICES = {"_client": "sagemaker", "_scaling_client": "application-autoscaling", "_alarm_client": "cloudwatch"}
USED_BY_AWS = {  # what AWS checks when it makes a call on behalf of the user: a role, tags, autoscaling
    "iam:PassRole", "iam:CreateServiceLinkedRole", "application-autoscaling:TagResource",
    "sagemaker:UpdateEndpointWeightsAndCapacities"}
WITHOUT_RESOURCE = ("sagemaker:List", "application-autoscaling:", "cloudwatch:", "ecr:GetAuthorizationToken")


def policies() -> list[list[dict[str, Any]]]:
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    return [json.loads(block)["Statement"] for block in re.findall(r"```json\n(.*?)```", page, re.S)]


def needed() -> set[str]:
    """The permissions of the calls in the code, by the names of the clients."""
    calls = set(re.findall(r"\bself\.(_\w*client)\.([a-z]+_[a-z_]+)\(", CODE)) | {
        ("_client", name) for name in re.findall(r'_list\(\s*"(\w+)"', CODE)}
    return {f"{SERVICES[client]}:{name.title().replace('_', '')}" for client, name in calls
            if name != "get_paginator"}


def test_the_policy_allows_what_the_code_calls_and_no_more() -> None:
    allowed = {action for statement in policies()[0] for action in statement["Action"]}
    assert {"sagemaker:CreateEndpoint", "sagemaker:ListModels", "cloudwatch:PutMetricAlarm"} <= needed()
    assert allowed == needed() | USED_BY_AWS | set(S3_CALLS.values())


def test_every_permission_in_a_message_is_one_that_the_code_needs() -> None:
    services = "|".join(SERVICES.values())
    assert set(re.findall(rf'"((?:{services}):[A-Z]\w+)"', CODE)) == needed()


def test_the_policies_name_no_wildcard_action_and_resources_where_aws_accepts_them() -> None:
    for statements in policies():
        for statement in statements:
            assert not any("*" in action for action in statement["Action"])
            if statement["Resource"] == "*":
                assert all(action.startswith(WITHOUT_RESOURCE) for action in statement["Action"])
