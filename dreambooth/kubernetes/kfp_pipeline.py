"""Builds a sweep as a compiled pipeline for Kubeflow Pipelines v2.

The compiled pipeline (IR, intermediate representation) is built as a dict, without the SDK.

Stages share the workspace of the pipeline run (`/kfp-workspace`), a volume that Kubeflow Pipelines creates and deletes.
The results of a stage are artifacts. A second YAML document contains the settings for Kubernetes, such as tolerations.
"""

from typing import Any

from dreambooth.config.enums import Device
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import WorkflowSpec

NAME = "dreambooth-sweep"
WORKSPACE = "{{$.workspace_path}}"
# backoffMaxDuration is counted from the start of the first attempt. Its default of 0 would prevent every retry. It is
# one week, because a run may be lost after many hours.
RETRY_POLICY = {"maxRetryCount": 2, "backoffDuration": "30s", "backoffFactor": 2.0, "backoffMaxDuration": "604800s"}
RUN_ID = "{{$.pipeline_job_uuid}}"
TEXT, LIST, NUMBER = "STRING", "LIST", "NUMBER_DOUBLE"
TRIALS_OUTPUT = "Output"  # the list of trials; kfp's local runner iterates only over outputs with this name
TRIALS_CHANNEL = f"pipelinechannel--validate-{TRIALS_OUTPUT}"  # the name that kfp's compiler gives this list
LOOP_ITEM = f"{TRIALS_CHANNEL}-loop-item"
# stage -> (input parameters, output parameters, output artifacts, arguments after the stage's name)
STAGES: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str], list[str]]] = {
    "validate": ({"overrides": TEXT, "sweep": TEXT}, {TRIALS_OUTPUT: LIST}, {},
                 ["--words", "overrides", "--space", "sweep"]),
    "class-images": ({"overrides": TEXT}, {}, {}, ["--words", "overrides"]),
    "train": ({"overrides": TEXT, "trial": TEXT}, {"run": TEXT, "objective": NUMBER},
              {"metrics": "system.Metrics", "contact_sheet": "system.HTML"},
              ["--words", "overrides", "--trial", "trial", f"tracking.sweep={RUN_ID}"]),
    "evaluate": ({"evaluate": TEXT, "run": TEXT}, {}, {"measures": "system.Metrics"},
                 ["--words", "evaluate", "run=run"]),
    "promote": ({"promote": TEXT}, {}, {"model": "system.Model"}, ["--words", "promote", f"sweep={RUN_ID}"]),
}


def build_pipeline(spec: WorkflowSpec) -> list[dict[str, Any]]:
    """Build the two YAML documents of the pipeline: the pipeline specification, and the platform settings."""
    pipeline = {
        "schemaVersion": "2.1.0", "sdkVersion": "kfp-2.17.3", "pipelineInfo": {"name": NAME},
        "root": {
            "dag": {"tasks": {
                "validate": _task("validate", {"overrides": "overrides", "sweep": "sweep"}),
                "class-images": _task("class-images", {"overrides": "overrides"}, dependencies=["validate"]),
                "trials": _trials_task(),
                # Failed trials do not stop promotion.
                "promote": _task("promote", {"promote": "promote"}, dependencies=["trials"]) | {
                    "triggerPolicy": {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}}}},
            "inputDefinitions": {"parameters": {
                name: {"parameterType": TEXT, "defaultValue": value, "isOptional": True} for name, value in {
                    "overrides": spec.overrides_text, "sweep": spec.space.name, "evaluate": "", "promote": "",
                }.items()}}},
        "components": {**{f"comp-{name}": _component(name) for name in STAGES}, "comp-trials": _trial_component()},
        "deploymentSpec": {"executors": {f"exec-{name}": {"container": _container(spec, name)} for name in STAGES}}}
    return [pipeline, {"platforms": {"kubernetes": _platform(spec)}}]


def _task(name: str, inputs: dict[str, str], dependencies: list[str] | None = None) -> dict[str, Any]:
    task: dict[str, Any] = {
        "componentRef": {"name": f"comp-{name}"}, "cachingOptions": {}, "retryPolicy": RETRY_POLICY,
        "taskInfo": {"name": name}}
    if inputs:
        task["inputs"] = {"parameters": {key: {"componentInputParameter": value} for key, value in inputs.items()}}
    if dependencies:
        task["dependentTasks"] = dependencies
    return task


def _trials_task() -> dict[str, Any]:
    """Build the task that runs all trials, one per item in the output list of the stage `validate`."""
    return {
        "componentRef": {"name": "comp-trials"}, "dependentTasks": ["class-images", "validate"],
        "inputs": {"parameters": {
            "overrides": {"componentInputParameter": "overrides"}, "evaluate": {"componentInputParameter": "evaluate"},
            TRIALS_CHANNEL: {"taskOutputParameter": {
                "producerTask": "validate", "outputParameterKey": TRIALS_OUTPUT}}}},
        "iteratorPolicy": {"parallelismLimit": 4},
        "parameterIterator": {"itemInput": LOOP_ITEM, "items": {"inputParameter": TRIALS_CHANNEL}},
        "taskInfo": {"name": "trials"}}


def _component(name: str) -> dict[str, Any]:
    inputs, parameters, artifacts, _ = STAGES[name]
    outputs: dict[str, Any] = {}
    if artifacts:
        outputs["artifacts"] = {key: {"artifactType": {"schemaTitle": kind, "schemaVersion": "0.0.1"}}
                                for key, kind in artifacts.items()}
    if parameters:
        outputs["parameters"] = {key: {"parameterType": kind} for key, kind in parameters.items()}
    component: dict[str, Any] = {"executorLabel": f"exec-{name}"}
    if inputs:
        component["inputDefinitions"] = {"parameters": {key: {"parameterType": kind} for key, kind in inputs.items()}}
    if outputs:
        component["outputDefinitions"] = outputs
    return component


def _trial_component() -> dict[str, Any]:
    tasks = {"train": _task("train", {"overrides": "overrides", "trial": LOOP_ITEM}),
             "evaluate": _task("evaluate", {"evaluate": "evaluate"}, dependencies=["train"])}
    tasks["evaluate"]["inputs"]["parameters"]["run"] = {
        "taskOutputParameter": {"producerTask": "train", "outputParameterKey": "run"}}
    return {"dag": {"tasks": tasks}, "inputDefinitions": {"parameters": {
        "overrides": {"parameterType": TEXT}, "evaluate": {"parameterType": TEXT},
        TRIALS_CHANNEL: {"parameterType": LIST}, LOOP_ITEM: {"parameterType": TEXT}}}}


def _container(spec: WorkflowSpec, name: str) -> dict[str, Any]:
    inputs, parameters, artifacts, stage_args = STAGES[name]
    args = [name, "--out", "/tmp/stage"]
    for arg in stage_args:
        key, _, value = arg.rpartition("=")
        if key and value in inputs:
            args.append(f"{key}={_input_parameter(value)}")
        else:
            args.append(_input_parameter(arg) if arg in inputs else arg)
    if name != "evaluate":
        args.append(f"run_root={WORKSPACE}/runs")
    container: dict[str, Any] = {
        "image": spec.image, "command": ["python", "-m", "dreambooth.stage"],
        "args": [*args, *(["--kfp", "{{$}}"] if parameters or artifacts else [])],
        "env": [{"name": "HF_HOME", "value": f"{pod_spec.KFP_WORKSPACE}/huggingface"}]}
    if name in pod_spec.GPU_STAGES and spec.hardware.device is not Device.cpu:
        limits = pod_spec.resources(spec.hardware)["limits"]
        container["resources"] = {
            "resourceMemoryLimit": limits["memory"], "resourceMemoryRequest": limits["memory"],
            "accelerator": {"resourceType": pod_spec.GPU_RESOURCE, "resourceCount": limits[pod_spec.GPU_RESOURCE]}}
    return container


def _input_parameter(name: str) -> str:
    return f"{{{{$.inputs.parameters['{name}']}}}}"


def _platform(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the platform settings: node selector, tolerations, ConfigMap, Secret, and workspace size."""
    placement = pod_spec.placement(spec.hardware)
    secret_keys = [{"secretKey": key, "envVar": key} for key in pod_spec.SECRET_KEYS]
    credentials = {"secretAsEnv": [{"secretName": pod_spec.SECRET, "keyToEnv": secret_keys, "optional": True}],
                   "configMapAsEnv": [{"configMapName": pod_spec.CONFIG_MAP, "optional": True, "keyToEnv": [
                       {"configMapKey": key, "envVar": key} for key in pod_spec.CONFIG_MAP_KEYS]}]}
    nodes: dict[str, Any] = {}
    if "nodeSelector" in placement:
        nodes["nodeSelector"] = {"labels": placement["nodeSelector"]}
    if "tolerations" in placement:
        nodes["tolerations"] = placement["tolerations"]
    return {
        "deploymentSpec": {"executors": {
            f"exec-{name}": {**credentials, **(nodes if name in pod_spec.GPU_STAGES else {})} for name in STAGES}},
        "pipelineConfig": {"workspace": {"size": "100Gi", "kubernetes": {
            "pvcSpecPatch": {"accessModes": ["ReadWriteMany"]}}}}}
