"""Strict schemas of workflow files: an unknown key is an error.

The schemas are read from the folder in the environment variable WORKFLOW_SCHEMAS; they are not part of the project.
"""

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(os.environ["WORKFLOW_SCHEMAS"]) if os.environ.get("WORKFLOW_SCHEMAS") else None
ARGO = {"WorkflowTemplate": "crd-workflowtemplates", "CronWorkflow": "crd-cronworkflows"}
Json = dict[str, Any]


def strict(schema: Any) -> Any:
    """A schema that rejects unknown keys, with int-or-string and nullable expressed as JSON Schema does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if "properties" in result and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def _crd(path: Path) -> Json:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        crd = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [one for one in crd["spec"]["versions"] if one["served"]]
    schema: Json = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _katib(path: Path) -> Json:
    """The Experiment of Katib's OpenAPI, which contains only the names of Kubernetes' own types."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        definitions = json.load(file)["components"]["schemas"]
    schemas = {name: strict(one) if "v1beta1" in name else {} for name, one in definitions.items()}

    def expand(schema: Any) -> Any:
        if isinstance(schema, list):
            return [expand(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return expand(schemas.get(schema["$ref"].rpartition("/")[2], {}))
        return {key: expand(value) for key, value in schema.items()}

    schema: Json = expand(schemas[next(name for name in schemas if name.endswith("v1beta1.Experiment"))])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@cache
def schemas(kind: str) -> tuple[tuple[str, Json], ...]:
    """Pairs (version, schema) of a kind; empty for a kind that is not a custom resource."""
    assert FOLDER
    if kind in ARGO:
        return tuple((folder.name, _crd(folder / f"{ARGO[kind]}.yaml.gz")) for folder in sorted(FOLDER.glob("argo-*")))
    if kind == "TrainJob":
        return (("trainer-v2", _crd(FOLDER / "trainer-v2/crd-trainjobs.yaml.gz")),)
    if kind == "InferenceService":
        return tuple((folder.name, _crd(folder / "crd-inferenceservices.yaml.gz"))
                     for folder in sorted(FOLDER.glob("kserve-*")))
    if kind == "Experiment":
        return (("katib-v0.19", _katib(FOLDER / "katib-v0.19/swagger.json.gz")),)
    return ()


# -- SageMaker Pipelines -------------------------------------------------------------------------------------------

PIPELINE_SCHEMA = "sagemaker-pipelines/pipeline-definition.schema.json"  # in FOLDER


def sagemaker_envelope() -> Json:
    """A schema of a pipeline definition, written for this project from the documentation of SageMaker Pipelines.

    The published schema has no licence, so it cannot be part of the project. Arguments of steps are left to botocore.
    """
    name = {"type": "string", "pattern": r"^[A-Za-z0-9\-_]{1,64}$"}
    step = {"Name": name, "Type": {"enum": ["Processing", "Training", "RegisterModel"]},
            "Arguments": {"type": "object"},
            "DependsOn": {"type": "array", "items": {"anyOf": [name, _object({"Step": name, "Trigger": {
                "enum": ["Failed", "Stopped", "Any"]}})]}},
            "RetryPolicies": {"type": "array", "items": _object({
                "ExceptionType": {"type": "array", "items": {"enum": [
                    "Step.SERVICE_FAULT", "Step.THROTTLING", "SageMaker.JOB_INTERNAL_ERROR",
                    "SageMaker.CAPACITY_ERROR", "SageMaker.RESOURCE_LIMIT"]}},
                "BackoffRate": {"type": "number"}, "IntervalSeconds": {"type": "integer"},
                "MaxAttempts": {"type": "integer", "minimum": 1, "maximum": 20}})},
            "PropertyFiles": {"type": "array", "items": _object({
                key: {"type": "string"} for key in ("PropertyFileName", "OutputName", "FilePath")})}}
    parameter = {"Name": name, "Type": {"const": "String"}, "DefaultValue": {"type": "string", "minLength": 1}}
    return _object({
        "Version": {"const": "2020-12-01"}, "Metadata": {"type": "object"},
        "Parameters": {"type": "array", "items": _object(parameter, "Name", "Type")},
        "Steps": {"type": "array", "items": _object(step, "Name", "Type", "Arguments")}})


def published_sagemaker_schema() -> Json:
    """The schema of aws-sagemaker-mlops/sagemaker-model-building-pipeline-definition-JSON-schema, and what is newer.

    The schema lacks parts of a definition that the SDK writes, and arguments that botocore's model of the service has.
    """
    assert FOLDER
    schema: Json = json.loads((FOLDER / PIPELINE_SCHEMA).read_text("utf-8"))
    kinds = schema["definitions"]
    for kind in ("Join", "JsonGet"):
        kinds["StringArgumentValue"]["oneOf"].append(_object({f"Std:{kind}": {"type": "object"}}))
    kinds["RetryPolicy"]["properties"]["ExceptionType"] = {
        "type": "array", "items": kinds["RetryPolicy"]["properties"]["ExceptionType"]}
    processing, training = kinds["ProcessingStep"]["properties"], kinds["TrainingStep"]["properties"]
    processing["PropertyFiles"] = {"type": "array"}
    processing["DependsOn"] = {"type": "array", "items": {"anyOf": [
        {"$ref": "#/definitions/StepName"}, _object({"Step": {"type": "string"}, "Trigger": {"const": "Any"}})]}}
    arguments = training["Arguments"]["properties"]
    arguments["Environment"] = {"type": "object"}
    arguments["OutputDataConfig"]["properties"]["CompressionType"] = {"enum": ["NONE", "GZIP"]}
    register = kinds["RegisterModelStep"]["properties"]["Arguments"]["properties"]
    register["InferenceSpecification"]["properties"]["Containers"]["items"]["properties"]["ModelDataSource"] = {
        "type": "object"}
    register |= {"ModelApprovalStatus": {"const": "PendingManualApproval"}, "CustomerMetadataProperties": {
        "type": "object", "additionalProperties": {"$ref": "#/definitions/StringArgumentValue"}}}
    return schema


def _object(properties: Json, *required: str) -> Json:
    return {"type": "object", "properties": properties, "required": list(required or properties),
            "additionalProperties": False}
