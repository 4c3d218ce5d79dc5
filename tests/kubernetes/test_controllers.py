"""The schemas and the rules of the controllers accept every object of workflows/, and detect what is wrong."""

import copy
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from dreambooth import workflows
from dreambooth.config.compose import SearchSpace
from dreambooth.kubernetes import katib, kfp_pipeline
from dreambooth.kubernetes.argo import build_sweep_template, build_train_template
from dreambooth.kubernetes.workflow_spec import TRIAL_RUN_DIR
from tests.kubernetes import argo_runner as argo
from tests.kubernetes.argo_expressions import evaluate
from tests.kubernetes.workflow_files import FOLDER, OBJECTS, SPACES, Json, documents, katib_container, katib_jobs
from tests.support import workflow_schemas as schemas

ROUND_TRIP = ("WorkflowTemplate", "CronWorkflow", "TrainJob", "Experiment")  # kinds that a client library describes
DUMP = {"by_alias": True, "exclude_none": True, "mode": "json"}
KSERVE: dict[str, type] = {  # what a predictor has beside a pod, from KServe's documentation of ComponentExtensionSpec
    "minReplicas": int, "maxReplicas": int, "scaleMetric": str, "scaleTarget": int, "timeout": int,
    "deploymentStrategy": dict}
FREE_KEYS = ("nodeSelector", "labels", "requests", "limits", "metadata", "annotations", "selector")  # maps of any key
KUBERNETES_VERSION = "1.34"  # whose schemas check the built-in objects
TEMPLATES = [param for param in OBJECTS if param.values[0]["kind"] == "WorkflowTemplate"]


# -- schemas of the controllers ---------------------------------------------------------------------------------------

def schema_errors(one: Json) -> list[str]:
    """Parts of an object that the client models or the schemas of Kubernetes do not know, or would change."""
    kind = one["kind"]
    if kind == "InferenceService":
        return kserve_errors(one)
    if kind not in ROUND_TRIP:
        try:
            kubernetes_validate.validate(one, KUBERNETES_VERSION, strict=True)
        except Exception as error:
            return [str(error).splitlines()[0]]
        return []
    try:
        errors = list(differences(one, round_trip(one), kind))
    except ValueError as error:
        return [str(error)]
    if kind == "Experiment":
        job = copy.deepcopy(one["spec"]["trialTemplate"]["trialSpec"])
        errors += schema_errors(job | {"metadata": {"name": "trial"}})
    return errors


def kserve_errors(one: Json) -> list[str]:
    """Parts of an InferenceService that KServe does not know. A predictor is the specification of a pod, and KSERVE."""
    predictor = copy.deepcopy(one["spec"]["predictor"])
    wrong = [key for key, kind in KSERVE.items() if not isinstance(predictor.pop(key, kind()), kind)]
    wrong += [*one.keys() - {"apiVersion", "kind", "metadata", "spec"}, *one["spec"].keys() - {"predictor"}]
    strategy = one["spec"]["predictor"]["deploymentStrategy"]
    template = {"metadata": {"labels": {"a": "b"}}, "spec": predictor}
    return wrong + schema_errors({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": one["metadata"] | {"name": "predictor"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "strategy": strategy, "template": template}})


def round_trip(one: Json) -> Json:
    """Through the models of hera or Kubeflow, which take seconds to import."""
    if one["kind"] == "TrainJob":
        from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

        return TrainerV1alpha1TrainJob.from_dict(one).to_dict()
    if one["kind"] == "Experiment":
        from kubeflow_katib_api.models import V1beta1Experiment

        return V1beta1Experiment.from_dict(one).to_dict()
    from hera.workflows import models

    return getattr(models, one["kind"]).model_validate(one).model_dump(**DUMP)


def differences(one: Any, other: Any, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path}.{number}")
    elif one != other:
        yield path


@pytest.mark.parametrize("one", OBJECTS)
def test_client_models_round_trip_every_object(one: Json) -> None:
    assert schema_errors(one) == []


@pytest.mark.skipif(schemas.FOLDER is None, reason="WORKFLOW_SCHEMAS is not set")
@pytest.mark.parametrize("one", OBJECTS)
def test_strict_schemas_accept_every_object(one: Json) -> None:
    versions = schemas.schemas(one["kind"])
    assert versions or one["kind"] not in ROUND_TRIP
    for version, schema in versions:
        errors = [f"{version} {error.json_path}: {error.message[:200]}"
                  for error in jsonschema.Draft202012Validator(schema).iter_errors(one)]
        assert errors == []


def schema_paths(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every nested object whose keys a schema defines; not of maps with free keys, such as labels."""
    if isinstance(part, dict) and path and path[-1] in FREE_KEYS:
        return
    if isinstance(part, dict):
        yield path
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield from schema_paths(value, (*path, key))


@pytest.mark.parametrize("one", OBJECTS)
def test_a_misspelt_key_is_detected_anywhere(one: Json) -> None:
    """Also without WORKFLOW_SCHEMAS: client models drop an unknown key, which the round trip shows."""
    missed = []
    for path in schema_paths(one):
        broken = copy.deepcopy(one)
        part = broken
        for key in path:
            part = part[key]
        part["misspelt"] = "x"
        detected = bool(schema_errors(broken))
        if schemas.FOLDER and not detected:
            detected = any(not jsonschema.Draft202012Validator(schema).is_valid(broken)
                           for _, schema in schemas.schemas(one["kind"]))
        missed += [] if detected else [path]
    assert missed == []


# -- Argo's own rules ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_the_templates_follow_argos_rules(template: Json) -> None:
    assert list(argo.problems(template)) == []


def change(template: Json, path: str, value: Any) -> Json:
    """A copy with a new value at a path below `templates`, such as `1|dag|tasks|0|depends`; None removes the key."""
    changed = copy.deepcopy(template)
    part: Any = changed["spec"]["templates"]
    *parents, last = [int(word) if word.isdecimal() else word for word in path.split("|")]
    for key in parents:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return changed


@pytest.mark.parametrize("path, value, problem", [
    ("0|dag|tasks|1|template", "class-image", "calls class-image, which is not a template"),
    ("0|dag|tasks|1|depends", "validat.Succeeded", "depends on validat, which is not a task"),
    ("0|dag|tasks|0|depends", "promote.Succeeded", "tasks depend on each other in a cycle"),
    ("0|dag|tasks|2|withParam", "{{tasks.validate.outputs.parameters.trial}}", "validate has no output trial"),
    ("0|dag|tasks|1|depends", None, "does not depend on validate"),
    ("0|dag|tasks|2|arguments", None, "does not pass trial"),
    ("0|dag|tasks|3|arguments", {"parameters": [{"name": "x", "value": "y"}]},
     "passes x, which is not an input of promote"),
    ("2|container|args|4", "{{workflow.parameters.override}}", "{{workflow.parameters.override}} is not declared"),
    ("2|container|args|4", "{{item}}", "{{item}} is not declared"),
    ("1|dag|tasks|1|arguments|parameters|0|value", "{{tasks.train.outputs.parameters.ran}}", "train has no output ran"),
    ("1|dag|tasks|0|template", "trial", "templates call each other in a cycle"),
])
def test_the_rules_detect_what_argo_would_reject(path: str, value: Any, problem: str) -> None:
    [template] = documents("argo/dreambooth-sweep.yaml")
    assert problem in "\n".join(argo.problems(change(template, path, value)))


# What Argo's controller passes for a pod that ended: phase, exit code of the container `main` (-1: it has none) and
# message; and whether another attempt can succeed. If the kubelet has left a message on the pod, Argo takes this
# message and the phase Failed, whatever the containers did.
ENDS = [
    ("Failed", 1, "main: Error (exit code 1)", False), ("Failed", 3, "main: Error (exit code 3)", False),
    ("Failed", 4, "main: Error (exit code 4)", False), ("Failed", 6, "main: Error (exit code 6)", False),
    ("Failed", 5, "main: Error (exit code 5)", True), ("Failed", 143, "main: Error (exit code 143)", True),
    # out of host memory: in the container, in a child process that the stage reports, in Argo's own container
    ("Failed", 137, "main: OOMKilled (exit code 137)", False), ("Failed", 137, "main: Error (exit code 137)", False),
    ("Error", 137, "wait: OOMKilled (exit code 137)", False), ("Failed", 143, "main: OOMKilled (exit code 143)", False),
    # the pod or its node is gone
    ("Error", -1, "pod deleted", True), ("Error", 5, "wait: Error (exit code 1)", True),
    ("Error", -1, "Pod failed before main container starts due to ContainerCreating: ", True),
    ("Failed", -1, "can't find failed message for pod a namespace b", True),
    ("Failed", -1, "pod failed: neither main nor wait container completed successfully", True),
    ("Failed", 0, "pod failed: wait container did not complete successfully", True),
    # node shutdown: saved, killed after the grace period, ended before Argo had stored the outputs, never started
    ("Failed", 5, "Pod was terminated in response to imminent node shutdown.", True),
    ("Failed", 137, "Pod was terminated in response to imminent node shutdown.", True),
    ("Failed", 0, "Pod was terminated in response to imminent node shutdown.", True),
    ("Failed", -1, "Pod was rejected as the node is shutting down.", True),
    ("Failed", 6, "Pod was terminated in response to imminent node shutdown.", False),
    # eviction by the kubelet, rejection, preemption by a critical pod
    ("Failed", 137, "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. ", True),
    ("Failed", -1, "The node was low on resource: ephemeral-storage. ", True),
    ("Failed", 137, "The node had condition: [DiskPressure]. ", True),
    ("Failed", -1, "Pod was rejected: Node didn't have enough resource: nvidia.com/gpu, requested: 1, used: 1", True),
    ("Failed", 137, "Preempted in order to admit critical pod", True),
    # limits of the pod itself
    ("Failed", 137, "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ", False),
    ("Failed", 137, "Pod was active on the node longer than the specified deadline", False)]


@pytest.mark.parametrize("build", [build_train_template, build_sweep_template])
def test_only_interrupted_or_lost_stages_are_retried(build: Any) -> None:
    templates = build(workflows.build_spec())["spec"]["templates"]
    parts = [part for part in templates if "container" in part and part["name"] != "ended"]
    assert [(status, code, message, *{argo.should_retry(part, code, 0, status, message=message) for part in parts})
            for status, code, message, _ in ENDS] == ENDS
    assert not any(argo.should_retry(part, 5, 5) for part in parts)


@pytest.mark.parametrize("expression, value", [
    ('!(lastRetry.message contains "node") || lastRetry.status == "Failed" && false_', None), ("asInt(137)", None),
    ('lastRetry.exitCode == 137', None), ('"137"', None), ("(1 in [1]", None), ("lastRetry.reason == ''", None),
    ("lastRetry.message matches 'node|pod' && asInt(lastRetry.exitCode) not in [-1, 5]", True),
    ("asInt(lastRetry.exitCode) == -137 || lastRetry.exitCode in ['5', '137']", True),
    ("!(lastRetry.status != 'Failed') && 1 == 2", False)])
def test_the_evaluator_of_expressions_knows_argos_language(expression: str, value: bool | None) -> None:
    """The package expr 1.17, which Argo uses, gives the same values; None stands for an error, or for a mistake."""
    fields = {"status": "Failed", "exitCode": "137", "message": "a node", "duration": "3.5"}
    if value is None:
        with pytest.raises(ValueError):
            evaluate(expression, fields)
    else:
        assert evaluate(expression, fields) is value


@pytest.mark.parametrize("build", [build_train_template, build_sweep_template])
def test_a_run_that_is_preempted_after_days_is_retried(build: Any) -> None:
    days = 3 * 24 * 3600.0
    parts = [part for part in build(workflows.build_spec())["spec"]["templates"] if "retryStrategy" in part]
    assert {argo.should_retry(part, 5, 0, after=days) for part in parts} == {True}
    strategy = {"limit": "5", "expression": 'lastRetry.status == "Failed"', "backoff": {"maxDuration": "2h"}}
    assert not argo.should_retry({"retryStrategy": strategy}, 5, 0, after=days)
    assert argo.should_retry({"retryStrategy": strategy}, 5, 0, after=7000)
    tasks = kfp_pipeline.build_pipeline(workflows.build_spec())[0]["components"]["comp-trials"]["dag"]["tasks"]
    assert float(tasks["train"]["retryPolicy"]["backoffMaxDuration"].removesuffix("s")) > days


def test_katib_retries_lost_pods_but_not_fatal_exit_codes() -> None:
    [experiment] = documents("kubeflow/katib-experiment.yaml")
    lost_node, fatal = experiment["spec"]["trialTemplate"]["trialSpec"]["spec"]["podFailurePolicy"]["rules"]
    assert (lost_node["action"], lost_node["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert fatal["onExitCodes"]["values"] == [1, 3, 4, 6]


@pytest.mark.parametrize("name", SPACES)
def test_katib_tries_each_point_once(name: str) -> None:
    """Two trials of one point would be one run, and the second would find its folder locked."""
    spec = katib.build_experiment(workflows.build_spec(space=name))["spec"]
    points = [one["feasibleSpace"]["list"] for one in spec["parameters"]]
    assert spec["algorithm"] == {"algorithmName": "grid"}
    assert spec["maxTrialCount"] == math.prod(map(len, points)), "Katib rejects more trials; fewer would omit points"
    assert all(len(set(one)) == len(one) for one in points)


def test_katib_gets_finite_numbers_as_numbers() -> None:
    space = SearchSpace("mine", {"a": ("1e-4", "1_0"), "b": ("nan", "1"), "c": ("1__0", "1")})
    parameters = katib.build_experiment(replace(workflows.build_spec(), space=space))["spec"]["parameters"]
    assert [one["parameterType"] for one in parameters] == ["discrete", "categorical", "categorical"]


def test_a_trials_arguments_survive_katibs_shell(tmp_path: Path) -> None:
    """Katib's webhook joins command and args by spaces, adds a missing `sh -c`, and redirects the output."""
    prompts = ('"zwx\'s toy"', "\"a \\\"zwx\\\" `id` $(id) ; toy'\"")
    space = SearchSpace("mine", {"dataset.instance_prompt": prompts})
    experiment = katib.build_experiment(replace(workflows.build_spec(), space=space))
    (tmp_path / "python").write_text('#!/bin/sh\nfor arg; do echo "$arg"; done\n', "utf-8")
    (tmp_path / "python").chmod(0o755)
    for job, prompt in zip(katib_jobs(experiment), prompts, strict=True):
        args, variables = katib_container(job)
        shell, args = (args[:2], args[2:]) if args[:2] == ["sh", "-c"] else (["sh", "-c"], args)
        script = " ".join([*args, f"1>{tmp_path}/metrics.log 2>&1", "&&", "echo completed"])
        result = subprocess.run([*shell, script], capture_output=True, text=True, check=False,
                                env=os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
        assert (result.returncode, result.stdout) == (0, "completed\n"), result.stderr
        received = (tmp_path / "metrics.log").read_text("utf-8").splitlines()
        assert received[:2] == ["-m", "dreambooth.train"]
        assert {"dataset.instance_prompt=a photo of a zwx dog", TRIAL_RUN_DIR,
                f"dataset.instance_prompt={prompt}"} <= set(received)


def environment_sources(part: Any) -> set[tuple[str, str]]:
    """(ConfigMap or Secret, variable) of every reference in a part of a file; "*" stands for all keys."""
    if isinstance(part, list):
        return set().union(*map(environment_sources, part))
    if not isinstance(part, dict):
        return set()
    sources = {(part[kind]["name"], "*") for kind in ("configMapRef", "secretRef") if kind in part}
    sources |= {(source["name"], part["name"]) for source in part.get("valueFrom", {}).values()
                if isinstance(source, dict) and source.get("optional")}
    for kind, name in (("secretAsEnv", "secretName"), ("configMapAsEnv", "configMapName")):
        sources |= {(one[name], key["envVar"]) for one in part.get(kind, ()) for key in one["keyToEnv"]
                    if one["optional"] and key.get("secretKey", key.get("configMapKey")) == key["envVar"]}
    return sources.union(*map(environment_sources, part.values()))


@pytest.mark.parametrize("name", [
    "argo/dreambooth-train", "argo/dreambooth-sweep", "kubeflow/trainjob", "kubeflow/trainjob-4gpu",
    "kubeflow/trainjob-2nodes", "kubeflow/katib-experiment", "kubeflow/pipeline"])
def test_every_controller_passes_the_same_settings_and_credentials(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text("utf-8")
    expected = {("dreambooth", key) for key in ("MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION")} | {
        ("dreambooth-secrets", key) for key in (
            "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY")}
    all_keys = {("dreambooth", "*"), ("dreambooth-secrets", "*")}
    assert environment_sources(documents(f"{name}.yaml")) in (expected, all_keys)
    # Pods of Kubeflow Pipelines have its service account: a pipeline cannot choose one.
    assert ("serviceAccountName: dreambooth" in text) == (name != "kubeflow/pipeline")
