"""Argo: a run and a sweep as WorkflowTemplates, and a run every night. Stages are `python -m dreambooth.stage`."""

import json
import shlex
from typing import Any

from dreambooth.errors import Interrupted
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import Asked

API = "argoproj.io/v1alpha1"
OUT = "/tmp/stage"  # where a stage leaves what Argo reads
TRAIN, SWEEP, NIGHTLY = "dreambooth-train", "dreambooth-sweep", "dreambooth-nightly"
DAYS = 86400  # seconds
SIGTERM = 143  # exit code of what was stopped before it could say so
# A pod that was lost with its node, a run that was stopped and saved. Not: wrong input, too little memory, divergence.
AGAIN = f'lastRetry.status == "Error" || asInt(lastRetry.exitCode) in [{Interrupted.exit_code}, {SIGTERM}]'
# No maxDuration: Argo counts it from the start of the first try, so that a run of many hours would never be repeated.
RETRIES = {"limit": "5", "retryPolicy": "Always", "expression": AGAIN, "backoff": {"duration": "30s", "factor": "2"}}
# A folder a night, named by the workflow: photos in S3 may have changed, which an earlier run's folder refuses, and a
# stage that is repeated finds the checkpoints of its own night.
NIGHT = "hydra.run.dir=${run_root}/${name}-${tracking.sweep}"
WITH_A_CARD = ("class-images", "train", "evaluate")  # stages that draw or train


def train(asked: Asked) -> dict[str, Any]:
    """One run: validate -> class images once -> train -> evaluate -> promote."""
    chain = [_task("validate"), _task("class-images", "validate"), _task("train", "class-images", trial=""),
             _task("evaluate", "train", run=_from("train", "run")), _task("promote", "evaluate")]
    return _template(TRAIN, asked, [{"name": "run", "dag": {"tasks": chain}}, *_stages(asked, "")], {})


def sweep(asked: Asked) -> dict[str, Any]:
    """A run for each point of a search space: the best is promoted, also if some failed."""
    fan = _task("trials", "class-images", template="trial", trial="{{item}}")
    fan["withParam"] = _from("validate", "trials")
    chain = [_task("validate"), _task("class-images", "validate"), fan,
             {**_task("promote"), "depends": "trials.AnySucceeded"}]
    trial = [_task("train", trial="{{inputs.parameters.trial}}"),
             _task("evaluate", "train", run=_from("train", "run"))]
    return _template(SWEEP, asked, [
        {"name": "run", "dag": {"failFast": False, "tasks": chain}},
        {"name": "trial", "inputs": {"parameters": [{"name": "trial"}]}, "dag": {"tasks": trial}},
        *_stages(asked, "{{workflow.parameters.sweep}}")], {"sweep": asked.space.name})


def nightly(asked: Asked) -> dict[str, Any]:
    """An example: the run, every night, on whatever photos are there then; its model replaces the last champion."""
    return {
        "apiVersion": API, "kind": "CronWorkflow", "metadata": {"name": NIGHTLY},
        "spec": {
            "schedules": ["30 2 * * *"], "timezone": "Etc/UTC", "concurrencyPolicy": "Forbid", "suspend": True,
            "startingDeadlineSeconds": 3600, "successfulJobsHistoryLimit": 3, "failedJobsHistoryLimit": 3,
            "workflowSpec": {"workflowTemplateRef": {"name": TRAIN}, "arguments": _arguments(
                overrides=shlex.join([*asked.overrides, NIGHT]), promote="replace=true")}}}


def _template(name: str, asked: Asked, templates: list[dict[str, Any]], more: dict[str, str]) -> dict[str, Any]:
    parameters = {"image": asked.image, "overrides": asked.typed, **more, "evaluate": "", "promote": ""}
    return {
        "apiVersion": API, "kind": "WorkflowTemplate", "metadata": {"name": name},
        "spec": {
            "entrypoint": "run", "onExit": "ended", "serviceAccountName": pod_spec.ACCOUNT,
            "arguments": {"parameters": [{"name": key, "value": value} for key, value in parameters.items()]},
            "parallelism": 4,
            "ttlStrategy": {"secondsAfterSuccess": 7 * DAYS, "secondsAfterFailure": 30 * DAYS},
            "podGC": {"strategy": "OnPodSuccess"},
            "podSpecPatch": json.dumps({"terminationGracePeriodSeconds": pod_spec.SAVING}),
            "securityContext": pod_spec.security(), "volumes": pod_spec.volumes(), "templates": templates}}


def _stages(asked: Asked, space: str) -> list[dict[str, Any]]:
    """A template a stage. `space`: the search space's name, or how Argo finds it."""
    words = ["--words", "{{workflow.parameters.overrides}}"]
    place, tag = f"run_root={pod_spec.RUNS}", "tracking.sweep={{workflow.name}}"
    trials = ["--space", space] if space else []
    return [
        _stage(asked, "validate", [*words, *trials, place], outputs=_values("trials")),
        _stage(asked, "class-images", [*words, place]),
        _stage(asked, "train", [*words, "--trial", "{{inputs.parameters.trial}}", place, tag], ["trial"],
               {**_values("run", "objective"), **_files("result.json", "contact_sheet.png")}),
        _stage(asked, "evaluate", ["--words", "{{workflow.parameters.evaluate}}", "run={{inputs.parameters.run}}"],
               ["run"], _files("evaluation.json")),
        _stage(asked, "promote", ["--words", "{{workflow.parameters.promote}}", "sweep={{workflow.name}}", place],
               outputs=_files("promoted.json", "compare.html")),
        _stage(asked, "ended", ["--status", "{{workflow.status}}", "--failures", "{{workflow.failures}}"]),
    ]


def _stage(asked: Asked, name: str, words: list[str], inputs: list[str] | None = None,
           outputs: dict[str, Any] | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name}
    if inputs:
        made["inputs"] = {"parameters": [{"name": key} for key in inputs]}
    if outputs:
        made["outputs"] = outputs
    card = name in WITH_A_CARD
    if name != "ended":
        made["retryStrategy"] = RETRIES
    return made | (pod_spec.placement(asked.hardware) if card else {}) | {"container": pod_spec.container(
        "{{workflow.parameters.image}}", ["python", "-m", "dreambooth.stage"], [name, "--out", OUT, *words],
    ) | {"resources": pod_spec.resources(asked.hardware) if card else pod_spec.LITTLE}}


def _values(*names: str) -> dict[str, Any]:
    return {"parameters": [{"name": name, "valueFrom": {"path": f"{OUT}/{name}"}} for name in names]}


def _files(*names: str) -> dict[str, Any]:
    """Artifacts as they are, not in a tar; optional, for a run may make no contact sheet."""
    return {"artifacts": [{"name": name.partition(".")[0].replace("_", "-"), "path": f"{OUT}/{name}",
                           "archive": {"none": {}}, "optional": True} for name in names]}


def _task(name: str, *after: str, template: str | None = None, **parameters: str) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "template": template or name}
    if after:
        made["depends"] = " && ".join(f"{task}.Succeeded" for task in after)
    if parameters:
        made["arguments"] = _arguments(**parameters)
    return made


def _arguments(**parameters: str) -> dict[str, Any]:
    return {"parameters": [{"name": key, "value": value} for key, value in parameters.items()]}


def _from(task: str, output: str) -> str:
    return f"{{{{tasks.{task}.outputs.parameters.{output}}}}}"
