"""Builds a Katib Experiment from a search space. Each trial is a Job, from whose output Katib reads the objective."""

import json
import re
from typing import Any

from dreambooth.config.compose import SearchSpace
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import TRIAL_RUN_DIR, WorkflowSpec, run_overrides

API_VERSION = "kubeflow.org/v1beta1"
# Matches the last line that training prints; Katib requires two groups, name and value.
OBJECTIVE = r"(objective)=([+-]?\d+(?:\.\d+)?(?:[Ee][+-]?\d+)?)"
CONTAINER = "train"


def build_experiment(spec: WorkflowSpec) -> dict[str, Any]:
    """Build the Experiment: a grid search over the whole search space, with four parallel trials.

    TPE, another search algorithm of Katib, is not used, because with parallel trials it may propose the same point
    twice. The two trials of this point would be the same run, and the second trial would fail because the run folder is
    locked.
    """
    # The whole key, because several keys may end in the same part. Katib allows letters, digits and hyphens.
    names = {key: re.sub(r"[._]", "-", key) for key in spec.space.values}
    return {
        "apiVersion": API_VERSION, "kind": "Experiment", "metadata": {"name": f"dreambooth-{spec.space.name}"},
        "spec": {
            "objective": {"type": "minimize", "objectiveMetricName": "objective"},
            "algorithm": {"algorithmName": "grid"},
            "parallelTrialCount": 4, "maxTrialCount": len(spec.space.trials()), "maxFailedTrialCount": 4,
            "metricsCollectorSpec": {
                "collector": {"kind": "StdOut"}, "source": {"filter": {"metricsFormat": [OBJECTIVE]}}},
            "parameters": [_parameter(name, key, spec.space) for key, name in names.items()],
            "trialTemplate": {
                "primaryContainerName": CONTAINER, "retain": True,
                "trialParameters": [{"name": name.replace("-", "_"), "reference": name, "description": key}
                                    for key, name in names.items()],
                "trialSpec": _trial_job(spec, names)}}}


def _parameter(name: str, key: str, space: SearchSpace) -> dict[str, Any]:
    """Build a parameter of the Experiment. Its values are the strings that Hydra's sweeper would pass to a run.

    Katib inserts a value into the JSON text of the trial's Job, in which it is a part of an environment variable. The
    value is therefore escaped for JSON, and for Kubernetes.
    """
    texts = [json.dumps(pod_spec.escape_variables(value), ensure_ascii=False)[1:-1] for value in space.values[key]]
    kind = "categorical" if space.numbers(key) is None else "discrete"
    return {"name": name, "parameterType": kind, "feasibleSpace": {"list": texts}}


def _trial_job(spec: WorkflowSpec, names: dict[str, str]) -> dict[str, Any]:
    """Build the Job of a trial.

    pod_spec.FATAL_EXIT_CODES are the exit codes of failures that a retry would repeat, such as wrong input. After such
    a code, Kubernetes does not start the Job's pod again. After any other failure, it starts the pod again, up to
    `backoffLimit` times. A lost node does not count as a failure.
    """
    parameters = [f"{key}=${{trialParameters.{name.replace('-', '_')}}}" for key, name in names.items()]
    overrides = [*run_overrides(spec, pod_spec.RUNS_MOUNT), TRIAL_RUN_DIR, f"sweep={spec.space.name}",
                 f"tracking.sweep=katib-{spec.space.name}", *parameters]
    # Katib joins command and args by spaces and runs the result in a shell, which would split a prompt and expand
    # ${...}. The script is therefore the same for all overrides: it passes variables, which the shell does not parse.
    variables = {f"OVERRIDE_{number}": override for number, override in enumerate(overrides, 1)}
    script = " ".join(["python", "-m", "dreambooth.train", *(f'"${name}"' for name in variables)])
    container = pod_spec.container(spec.image, ["sh", "-c"], [script], variables)
    return {
        "apiVersion": "batch/v1", "kind": "Job", **spec.queue_metadata,
        "spec": {
            "backoffLimit": 5,
            "podFailurePolicy": {"rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {
                    "containerName": CONTAINER, "operator": "In", "values": pod_spec.FATAL_EXIT_CODES}}]},
            "template": {"spec": {
                "restartPolicy": "Never", "serviceAccountName": pod_spec.SERVICE_ACCOUNT,
                "automountServiceAccountToken": False, "terminationGracePeriodSeconds": pod_spec.GRACE_PERIOD,
                "securityContext": pod_spec.security_context(),
                **pod_spec.placement(spec.hardware), "volumes": pod_spec.volumes(),
                "containers": [{"name": CONTAINER, **container, "resources": pod_spec.resources(spec.hardware)}]}}}}
