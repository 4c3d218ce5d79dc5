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
    if kind == "Experiment":
        return (("katib-v0.19", _katib(FOLDER / "katib-v0.19/swagger.json.gz")),)
    return ()
