"""The IAM policies allow what the code calls, and no more."""

import json
import re
from typing import Any

from tests.cloud.jobs import ROOT

S3_CALLS = {"get_object": "s3:GetObject", "head_object": "s3:GetObject", "put_object": "s3:PutObject",
            "list_objects_v2": "s3:ListBucket", "list_multipart_uploads": "s3:ListBucketMultipartUploads",
            "list_parts": "s3:ListMultipartUploadParts", "create_multipart_upload": "s3:PutObject",
            "upload_part": "s3:PutObject", "complete_multipart_upload": "s3:PutObject"}
OTHER_CALLS = {"create_training_job": "sagemaker:CreateTrainingJob",
               "create_hyper_parameter_tuning_job": "sagemaker:CreateHyperParameterTuningJob",
               "create_pipeline": "sagemaker:CreatePipeline", "update_pipeline": "sagemaker:UpdatePipeline",
               "describe_pipeline": "sagemaker:DescribePipeline",
               "start_pipeline_execution": "sagemaker:StartPipelineExecution",
               "get_secret_value": "secretsmanager:GetSecretValue"}
SDK_CALLS = {"stop": "sagemaker:StopTrainingJob", "refresh": "sagemaker:DescribeTrainingJob"}  # methods of TrainingJob
IMPLIED = {"iam:PassRole", "sagemaker:AddTags"}  # also needed by CreateTrainingJob with a role and tags
USED_BY_SAGEMAKER = {  # what the service itself does with the role
    "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetAuthorizationToken", "ecr:GetDownloadUrlForLayer",
    "logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents",
    "cloudwatch:PutMetricData"}


def policies() -> dict[str, list[dict[str, Any]]]:
    page = (ROOT / "docs/sagemaker.md").read_text(encoding="utf-8")
    found = [json.loads(block)["Statement"] for block in re.findall(r"```json\n(.*?)```", page, re.S)]
    return dict(zip(("submits", "runs", "mlflow"), found, strict=True))


def actions(statements: list[dict[str, Any]]) -> set[str]:
    return {action for statement in statements for action in statement["Action"]}


# Files whose client is MLflow's.
MLFLOW_FILES = {"mlflow_database.py", "mlflow_shipper.py", "mlflow_logging.py", "mlflow_model.py",
                "model_registry.py"}
MLFLOW_ACTIONS = {  # client method -> action that SageMaker's server checks; files are sent to S3 directly
    "set_terminated": "UpdateRun", "log_artifact": "GetRun", "log_artifacts": "GetRun", "list_artifacts": "GetRun",
    "log_image": "SetTag", "get_model_version_download_uri": "GetDownloadURIForModelVersionArtifacts"}


def aws_permissions() -> set[str]:
    """The permissions of every call to AWS in the code."""
    known, found = S3_CALLS | OTHER_CALLS, set()
    paths = [*(ROOT / "dreambooth").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.name not in MLFLOW_FILES
                     and path.parent.name != "deployment")  # it has a policy of its own: test_deployment_policy.py
    for call in re.findall(r"(?:\bs3|\bclient|_client)\.([a-z0-9]+_[a-z_0-9]+)\b", code):
        if call != "get_paginator":
            found.add(known[call])
    found |= {SDK_CALLS[call] for call in re.findall(r"bind_training_job\([^()]*\)\.(\w+)", code)}
    return found | {known[name] for name in re.findall(r'get_paginator\("(\w+)"\)', code)}


def mlflow_permissions() -> set[str]:
    """The permissions of every call of MLflow's client."""
    code = "\n".join((ROOT / "dreambooth/tracking" / name).read_text(encoding="utf-8") for name in sorted(MLFLOW_FILES))
    calls = set(re.findall(r"(?:\bclient|_client)\.([a-z]+_[a-z_]+)\(", code))
    return {f"sagemaker-mlflow:{MLFLOW_ACTIONS.get(call, call.title().replace('_', ''))}" for call in calls}


def test_the_policy_for_a_server_of_sagemakers_allows_what_is_mlflow_permissions() -> None:
    [statement] = policies()["mlflow"]
    assert set(statement["Action"]) == mlflow_permissions()
    assert {"sagemaker-mlflow:LogBatch", "sagemaker-mlflow:GetExperimentByName",
            "sagemaker-mlflow:SetRegisteredModelAlias"} <= mlflow_permissions()


def test_only_those_files_call_mlflow() -> None:
    """The files that `aws_permissions` leaves out are those that `mlflow_permissions` reads."""
    pattern = re.compile(r"MlflowClient|^\s*import mlflow|client: Any, run_id|(?<!def )\bopen_client\(", re.MULTILINE)
    found = {path.name for path in (ROOT / "dreambooth").rglob("*.py")
             if pattern.search(path.read_text(encoding="utf-8"))}
    assert found == MLFLOW_FILES


def test_the_policies_allow_what_the_code_calls_and_no_more() -> None:
    found = policies()
    needed = aws_permissions()
    assert actions(found["submits"]) == (needed - {"secretsmanager:GetSecretValue"}) | IMPLIED
    used_by_a_run = {call for call in needed if call.startswith(("s3:", "secretsmanager:"))}
    assert actions(found["runs"]) == used_by_a_run | USED_BY_SAGEMAKER


def test_the_policies_name_no_wildcard_action_and_nothing_that_deletes() -> None:
    for statements in policies().values():
        assert {action for action in actions(statements) if "*" in action or "Delete" in action} <= {
            "sagemaker-mlflow:DeleteRegisteredModelAlias"}  # the alias of a version, not the version
        for statement in statements:
            if statement["Resource"] == "*":  # these two actions accept no resource
                assert set(statement["Action"]) <= {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}


def test_every_permission_in_a_message_is_one_that_the_code_needs() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "dreambooth").rglob("*.py")
                     if path.parent.name != "deployment")
    named = set(re.findall(r'"((?:s3|sagemaker|secretsmanager):[A-Z]\w+)"', code))
    assert named == aws_permissions()
