"""Schemas of workflow files, made strict: a key that they do not know is an error.

The data lie in the folder that WORKFLOW_SCHEMAS names; the project does not hold them.
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
    """The same with no room for unknown keys, and with int-or-string and nullable in JSON Schema's words."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def _crd(path: Path) -> Json:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [one for one in found["spec"]["versions"] if one["served"]]
    schema: Json = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _katib(path: Path) -> Json:
    """The Experiment of Katib's OpenAPI; of Kubernetes' own types it knows the names only."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found = json.load(file)["components"]["schemas"]
    schemas = {name: strict(one) if "v1beta1" in name else {} for name, one in found.items()}

    def expanded(schema: Any) -> Any:
        if isinstance(schema, list):
            return [expanded(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return expanded(schemas.get(schema["$ref"].rpartition("/")[2], {}))
        return {key: expanded(value) for key, value in schema.items()}

    schema: Json = expanded(schemas[next(name for name in schemas if name.endswith("v1beta1.Experiment"))])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@cache
def schemas(kind: str) -> tuple[tuple[str, Json], ...]:
    """version -> schema of a kind; none of what is no custom resource."""
    assert FOLDER
    if kind in ARGO:
        return tuple((folder.name, _crd(folder / f"{ARGO[kind]}.yaml.gz")) for folder in sorted(FOLDER.glob("argo-*")))
    if kind == "TrainJob":
        return (("trainer-v2", _crd(FOLDER / "trainer-v2/crd-trainjobs.yaml.gz")),)
    if kind == "Experiment":
        return (("katib-v0.19", _katib(FOLDER / "katib-v0.19/swagger.json.gz")),)
    return ()
