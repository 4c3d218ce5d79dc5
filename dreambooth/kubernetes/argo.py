"""Builds Argo objects: WorkflowTemplates for a run and for a sweep, and a CronWorkflow that runs every night.

Each stage of a workflow is one container that runs `python -m dreambooth.stage`.
"""

import json
from dataclasses import replace
from typing import Any

from dreambooth.errors import Interrupted
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import WorkflowSpec

API_VERSION = "argoproj.io/v1alpha1"
OUTPUT_FOLDER = "/tmp/stage"  # a stage writes its outputs for Argo into this folder
TRAIN, SWEEP, NIGHTLY = "dreambooth-train", "dreambooth-sweep", "dreambooth-nightly"
DAY = 86400  # seconds
SIGTERM = 143  # exit code of a process that was killed by SIGTERM (128 + 15)
# Parts of the messages of a lost pod. The kubelet writes them when it shuts down, evicts or rejects a pod, and Argo
# reports such a pod as Failed. A message that begins with "pod failed:" is Argo's, of a pod whose node is gone. A limit
# that the pod itself exceeded is not in the list.
LOST_POD = ("node shutdown|node is shutting|low on resource|node had condition|was rejected|admit critical pod"
            "|^pod failed:")
# Retry a pod that was lost with its node, or a run that was stopped and has saved its state. A pod that never ran, or
# whose container has no result, has the exit code -1. Do not retry wrong input, too little memory or divergence: the
# result would be the same. lastRetry.message exists in Argo 3.5 and later.
RETRY_IF = (
    '!(lastRetry.message contains "OOMKilled") && (lastRetry.status == "Error" || '
    f"asInt(lastRetry.exitCode) in [-1, {Interrupted.exit_code}, {SIGTERM}] || "
    f'lastRetry.message matches "{LOST_POD}" && asInt(lastRetry.exitCode) not in {pod_spec.FATAL_EXIT_CODES})')
# No maxDuration: Argo counts it from the start of the first attempt, so a run of many hours would never be retried.
RETRY = {"limit": "5", "retryPolicy": "Always", "expression": RETRY_IF, "backoff": {"duration": "30s", "factor": "2"}}
# One run folder per night, named after the workflow. The photos in S3 may have changed since the previous night, and a
# run cannot be resumed with other photos. A retried stage resumes from the checkpoints of the same night.
NIGHTLY_RUN_DIR = "hydra.run.dir=${run_root}/${name}-${tracking.sweep}"


def build_train_template(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the WorkflowTemplate for one run: validate -> class-images -> train -> evaluate -> promote."""
    tasks = [_task("validate"), _task("class-images", "validate"), _task("train", "class-images", trial=""),
             _task("evaluate", "train", run=_output_of("train", "run")), _task("promote", "evaluate")]
    return _workflow_template(TRAIN, spec, [{"name": "run", "dag": {"tasks": tasks}}, *_stages(spec, "")], {})


def build_sweep_template(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the WorkflowTemplate for a sweep, with one run (a trial) per point of the search space.

    The best model is promoted if at least one trial has succeeded, even if others have failed. If the parameter
    `deploy` names a Deployment, it serves this model afterwards.
    """
    trials = _task("trials", "class-images", template="trial", trial="{{item}}")
    trials["withParam"] = _output_of("validate", "trials")
    tasks = [_task("validate"), _task("class-images", "validate"), trials,
             {**_task("promote"), "depends": "trials.AnySucceeded"},
             {**_task("deploy", "promote"), "when": "\"{{workflow.parameters.deploy}}\" != \"\""}]
    trial_tasks = [_task("train", trial="{{inputs.parameters.trial}}"),
                   _task("evaluate", "train", run=_output_of("train", "run"))]
    return _workflow_template(SWEEP, spec, [
        {"name": "run", "dag": {"failFast": False, "tasks": tasks}},
        {"name": "trial", "inputs": {"parameters": [{"name": "trial"}]}, "dag": {"tasks": trial_tasks}},
        *_stages(spec, "{{workflow.parameters.sweep}}"),
        _stage(spec, "deploy", ["--deployment", "{{workflow.parameters.deploy}}", "sweep={{workflow.name}}",
                                f"run_root={pod_spec.RUNS_MOUNT}"])], {"sweep": spec.space.name, "deploy": ""})


def build_nightly_workflow(spec: WorkflowSpec) -> dict[str, Any]:
    """Build an example CronWorkflow that trains on the current photos every night and replaces the champion.

    The champion is the model version that has the alias `champion` in MLflow's model registry.
    """
    nightly = replace(spec, overrides=(*spec.overrides, NIGHTLY_RUN_DIR))
    return {
        "apiVersion": API_VERSION, "kind": "CronWorkflow", "metadata": {"name": NIGHTLY},
        "spec": {
            "schedules": ["30 2 * * *"], "timezone": "Etc/UTC", "concurrencyPolicy": "Forbid", "suspend": True,
            "startingDeadlineSeconds": 3600, "successfulJobsHistoryLimit": 3, "failedJobsHistoryLimit": 3,
            "workflowSpec": {"workflowTemplateRef": {"name": TRAIN}, "arguments": _arguments(
                overrides=nightly.overrides_text, promote="replace=true")}}}


def _workflow_template(
    name: str, spec: WorkflowSpec, templates: list[dict[str, Any]], more: dict[str, str]
) -> dict[str, Any]:
    parameters = {"image": spec.image, "overrides": spec.overrides_text, **more, "evaluate": "", "promote": ""}
    return {
        "apiVersion": API_VERSION, "kind": "WorkflowTemplate", "metadata": {"name": name},
        "spec": {
            "entrypoint": "run", "onExit": "ended", "serviceAccountName": pod_spec.SERVICE_ACCOUNT,
            "arguments": {"parameters": [{"name": key, "value": value} for key, value in parameters.items()]},
            "parallelism": 4,
            "ttlStrategy": {"secondsAfterSuccess": 7 * DAY, "secondsAfterFailure": 30 * DAY},
            "podGC": {"strategy": "OnPodSuccess"},
            "podSpecPatch": json.dumps({"terminationGracePeriodSeconds": pod_spec.GRACE_PERIOD}),
            "securityContext": pod_spec.security_context(), "volumes": pod_spec.volumes(), "templates": templates}}


def _stages(spec: WorkflowSpec, space: str) -> list[dict[str, Any]]:
    """Build one Argo template per stage.

    Args:
        space: name of the search space, or an Argo expression for this name; empty for a single run.
    """
    overrides = ["--words", "{{workflow.parameters.overrides}}"]
    run_root, sweep_tag = f"run_root={pod_spec.RUNS_MOUNT}", "tracking.sweep={{workflow.name}}"
    space_args = ["--space", space] if space else []
    return [
        _stage(spec, "validate", [*overrides, *space_args, run_root], outputs=_output_parameters("trials")),
        _stage(spec, "class-images", [*overrides, run_root]),
        _stage(spec, "train", [*overrides, "--trial", "{{inputs.parameters.trial}}", run_root, sweep_tag], ["trial"],
               {**_output_parameters("run", "objective"), **_output_artifacts("result.json", "contact_sheet.png")}),
        _stage(spec, "evaluate", ["--words", "{{workflow.parameters.evaluate}}", "run={{inputs.parameters.run}}"],
               ["run"], _output_artifacts("evaluation.json")),
        _stage(spec, "promote", ["--words", "{{workflow.parameters.promote}}", "sweep={{workflow.name}}", run_root],
               outputs=_output_artifacts("promoted.json", "compare.html")),
        _stage(spec, "ended", ["--status", "{{workflow.status}}", "--failures", "{{workflow.failures}}"]),
    ]


def _stage(spec: WorkflowSpec, name: str, args: list[str], inputs: list[str] | None = None,
           outputs: dict[str, Any] | None = None) -> dict[str, Any]:
    template: dict[str, Any] = {"name": name}
    if inputs:
        template["inputs"] = {"parameters": [{"name": key} for key in inputs]}
    if outputs:
        template["outputs"] = outputs
    if name != "ended":
        template["retryStrategy"] = RETRY
    needs_gpu = name in pod_spec.GPU_STAGES
    placement = pod_spec.placement(spec.hardware) | spec.queue_metadata if needs_gpu else {}
    return template | placement | {"container": pod_spec.container(
        "{{workflow.parameters.image}}", ["python", "-m", "dreambooth.stage"], [name, "--out", OUTPUT_FOLDER, *args],
    ) | {"resources": pod_spec.resources(spec.hardware) if needs_gpu else pod_spec.SMALL_RESOURCES}}


def _output_parameters(*names: str) -> dict[str, Any]:
    return {"parameters": [{"name": name, "valueFrom": {"path": f"{OUTPUT_FOLDER}/{name}"}} for name in names]}


def _output_artifacts(*names: str) -> dict[str, Any]:
    """Build one output artifact for each file name in `names`.

    Argo stores an artifact as the file itself, not as a tar archive, and accepts that the file does not exist.
    """
    return {"artifacts": [{"name": name.partition(".")[0].replace("_", "-"), "path": f"{OUTPUT_FOLDER}/{name}",
                           "archive": {"none": {}}, "optional": True} for name in names]}


def _task(name: str, *dependencies: str, template: str | None = None, **parameters: str) -> dict[str, Any]:
    task: dict[str, Any] = {"name": name, "template": template or name}
    if dependencies:
        task["depends"] = " && ".join(f"{dependency}.Succeeded" for dependency in dependencies)
    if parameters:
        task["arguments"] = _arguments(**parameters)
    return task


def _arguments(**parameters: str) -> dict[str, Any]:
    return {"parameters": [{"name": key, "value": value} for key, value in parameters.items()]}


def _output_of(task: str, output: str) -> str:
    return f"{{{{tasks.{task}.outputs.parameters.{output}}}}}"
