"""Kubeflow Pipelines v2: the sweep as a compiled pipeline (IR), written as a dict; the SDK is not needed to make it.

Stages share the run's workspace, a volume that Pipelines makes and removes (`/kfp-workspace`); what is to stay leaves
as artifacts. Platform settings, in a second document, are read by a cluster only.
"""

from typing import Any

from dreambooth.config.enums import Device
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import Asked

NAME = "dreambooth-sweep"
WORKSPACE = "{{$.workspace_path}}"
# The last is a week, counted from the start of the first try: a run may be lost after many hours. Left out it is 0.
RETRY = {"maxRetryCount": 2, "backoffDuration": "30s", "backoffFactor": 2.0, "backoffMaxDuration": "604800s"}
RUN_ID = "{{$.pipeline_job_uuid}}"
TEXT, LIST, NUMBER = "STRING", "LIST", "NUMBER_DOUBLE"
LISTED = "Output"  # the list of trials: kfp's local runner fans out over an output of this name only
TRIALS = f"pipelinechannel--validate-{LISTED}"  # the compiler's name for it
ITEM = f"{TRIALS}-loop-item"
# stage -> (input parameters, output parameters, output artifacts, words after the stage's name)
STAGES: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str], list[str]]] = {
    "validate": ({"overrides": TEXT, "sweep": TEXT}, {LISTED: LIST}, {},
                 ["--words", "overrides", "--space", "sweep"]),
    "class-images": ({"overrides": TEXT}, {}, {}, ["--words", "overrides"]),
    "train": ({"overrides": TEXT, "trial": TEXT}, {"run": TEXT, "objective": NUMBER},
              {"metrics": "system.Metrics", "contact_sheet": "system.HTML"},
              ["--words", "overrides", "--trial", "trial", f"tracking.sweep={RUN_ID}"]),
    "evaluate": ({"evaluate": TEXT, "run": TEXT}, {}, {"measures": "system.Metrics"},
                 ["--words", "evaluate", "run=run"]),
    "promote": ({"promote": TEXT}, {}, {"model": "system.Model"}, ["--words", "promote", f"sweep={RUN_ID}"]),
}
WITH_A_CARD = ("class-images", "train", "evaluate")


def pipeline(asked: Asked) -> list[dict[str, Any]]:
    """Two documents: the pipeline, and what a cluster needs besides."""
    spec = {
        "schemaVersion": "2.1.0", "sdkVersion": "kfp-2.17.3", "pipelineInfo": {"name": NAME},
        "root": {
            "dag": {"tasks": {
                "validate": _task("validate", {"overrides": "overrides", "sweep": "sweep"}),
                "class-images": _task("class-images", {"overrides": "overrides"}, after=["validate"]),
                "trials": _fan_out(),
                "promote": _task("promote", {"promote": "promote"}, after=["trials"]) | {  # also if some failed
                    "triggerPolicy": {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}}}},
            "inputDefinitions": {"parameters": {
                name: {"parameterType": TEXT, "defaultValue": value, "isOptional": True} for name, value in {
                    "overrides": asked.typed, "sweep": asked.space.name, "evaluate": "", "promote": ""}.items()}}},
        "components": {**{f"comp-{name}": _component(name) for name in STAGES}, "comp-trials": _trial()},
        "deploymentSpec": {"executors": {f"exec-{name}": {"container": _container(asked, name)} for name in STAGES}}}
    return [spec, {"platforms": {"kubernetes": _platform(asked)}}]


def _fan_out() -> dict[str, Any]:
    """A trial for each item of what `validate` lists."""
    return {
        "componentRef": {"name": "comp-trials"}, "dependentTasks": ["class-images", "validate"],
        "inputs": {"parameters": {
            "overrides": {"componentInputParameter": "overrides"}, "evaluate": {"componentInputParameter": "evaluate"},
            TRIALS: {"taskOutputParameter": {"producerTask": "validate", "outputParameterKey": LISTED}}}},
        "iteratorPolicy": {"parallelismLimit": 4},
        "parameterIterator": {"itemInput": ITEM, "items": {"inputParameter": TRIALS}},
        "taskInfo": {"name": "trials"}}


def _trial() -> dict[str, Any]:
    tasks = {"train": _task("train", {"overrides": "overrides", "trial": ITEM}),
             "evaluate": _task("evaluate", {"evaluate": "evaluate"}, after=["train"])}
    tasks["evaluate"]["inputs"]["parameters"]["run"] = {
        "taskOutputParameter": {"producerTask": "train", "outputParameterKey": "run"}}
    return {"dag": {"tasks": tasks}, "inputDefinitions": {"parameters": {
        "overrides": {"parameterType": TEXT}, "evaluate": {"parameterType": TEXT}, TRIALS: {"parameterType": LIST},
        ITEM: {"parameterType": TEXT}}}}


def _task(name: str, given: dict[str, str], after: list[str] | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "componentRef": {"name": f"comp-{name}"}, "cachingOptions": {}, "retryPolicy": RETRY,
        "taskInfo": {"name": name}}
    if given:
        made["inputs"] = {"parameters": {key: {"componentInputParameter": value} for key, value in given.items()}}
    if after:
        made["dependentTasks"] = after
    return made


def _component(name: str) -> dict[str, Any]:
    inputs, parameters, artifacts, _ = STAGES[name]
    outputs: dict[str, Any] = {}
    if artifacts:
        outputs["artifacts"] = {key: {"artifactType": {"schemaTitle": kind, "schemaVersion": "0.0.1"}}
                                for key, kind in artifacts.items()}
    if parameters:
        outputs["parameters"] = {key: {"parameterType": kind} for key, kind in parameters.items()}
    made: dict[str, Any] = {"executorLabel": f"exec-{name}"}
    if inputs:
        made["inputDefinitions"] = {"parameters": {key: {"parameterType": kind} for key, kind in inputs.items()}}
    if outputs:
        made["outputDefinitions"] = outputs
    return made


def _container(asked: Asked, name: str) -> dict[str, Any]:
    inputs, parameters, artifacts, words = STAGES[name]
    args = [name, "--out", "/tmp/stage"]
    for word in words:
        key, _, value = word.rpartition("=")
        args.append(f"{key}={_given(value)}" if key and value in inputs else _given(word) if word in inputs else word)
    if name != "evaluate":
        args.append(f"run_root={WORKSPACE}/runs")
    made: dict[str, Any] = {
        "image": asked.image, "command": ["python", "-m", "dreambooth.stage"],
        "args": [*args, *(["--kfp", "{{$}}"] if parameters or artifacts else [])],
        "env": [{"name": "HF_HOME", "value": f"{pod_spec.WORKSPACE}/huggingface"}]}
    if name in WITH_A_CARD and asked.hardware.device is not Device.cpu:
        needed = pod_spec.resources(asked.hardware)["limits"]
        made["resources"] = {
            "resourceMemoryLimit": needed["memory"], "resourceMemoryRequest": needed["memory"],
            "accelerator": {"resourceType": pod_spec.GPU, "resourceCount": needed[pod_spec.GPU]}}
    return made


def _given(name: str) -> str:
    return f"{{{{$.inputs.parameters['{name}']}}}}"


def _platform(asked: Asked) -> dict[str, Any]:
    """Nodes and tolerations, credentials by reference, the size of the workspace."""
    place = pod_spec.placement(asked.hardware)
    keys = [{"secretKey": key, "envVar": key} for key in pod_spec.SECRET_KEYS]
    every = {"secretAsEnv": [{"secretName": pod_spec.SECRETS, "keyToEnv": keys, "optional": True}],
             "configMapAsEnv": [{"configMapName": pod_spec.SETTINGS, "optional": True, "keyToEnv": [
                 {"configMapKey": key, "envVar": key} for key in pod_spec.SETTING_KEYS]}]}
    nodes: dict[str, Any] = {}
    if "nodeSelector" in place:
        nodes["nodeSelector"] = {"labels": place["nodeSelector"]}
    if "tolerations" in place:
        nodes["tolerations"] = place["tolerations"]
    return {
        "deploymentSpec": {"executors": {
            f"exec-{name}": {**every, **(nodes if name in WITH_A_CARD else {})} for name in STAGES}},
        "pipelineConfig": {"workspace": {"size": "100Gi", "kubernetes": {
            "pvcSpecPatch": {"accessModes": ["ReadWriteMany"]}}}}}
