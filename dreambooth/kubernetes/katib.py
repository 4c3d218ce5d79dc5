"""Katib: a search space as an Experiment whose trials are Jobs; the objective is read from what a run prints."""

import shlex
from typing import Any

from dreambooth.errors import Diverged, DoesNotFit, OutOfMemory, UserError
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import TRIAL, Asked, run_words

API = "kubeflow.org/v1beta1"
OBJECTIVE = r"(objective)=([+-]?\d+(?:\.\d+)?(?:[Ee][+-]?\d+)?)"  # train's last line; Katib asks for two groups
HOPELESS = [kind.exit_code for kind in (UserError, DoesNotFit, OutOfMemory, Diverged)]  # a repetition ends the same
CONTAINER = "train"


def experiment(asked: Asked) -> dict[str, Any]:
    """The grid, four points at a time.

    Not TPE: with trials in parallel it proposes a point that is being tried, and two trials of one point are one run,
    which the second finds locked.
    """
    names = {key: key.rpartition(".")[2].replace("_", "-") for key in asked.space.values}
    return {
        "apiVersion": API, "kind": "Experiment", "metadata": {"name": f"dreambooth-{asked.space.name}"},
        "spec": {
            "objective": {"type": "minimize", "objectiveMetricName": "objective"},
            "algorithm": {"algorithmName": "grid"},
            "parallelTrialCount": 4, "maxTrialCount": len(asked.space.trials()), "maxFailedTrialCount": 4,
            "metricsCollectorSpec": {
                "collector": {"kind": "StdOut"}, "source": {"filter": {"metricsFormat": [OBJECTIVE]}}},
            "parameters": [_parameter(names[key], values) for key, values in asked.space.values.items()],
            "trialTemplate": {
                "primaryContainerName": CONTAINER, "retain": True,
                "trialParameters": [{"name": name.replace("-", "_"), "reference": name, "description": key}
                                    for key, name in names.items()],
                "trialSpec": _trial(asked, names)}}}


def _parameter(name: str, values: tuple[str, ...]) -> dict[str, Any]:
    """Texts as they are typed, so that a trial is the very run that Hydra would have made."""
    kind = "discrete" if all(_number(value) for value in values) else "categorical"
    return {"name": name, "parameterType": kind, "feasibleSpace": {"list": list(values)}}


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _trial(asked: Asked, names: dict[str, str]) -> dict[str, Any]:
    """A Job that begins again after a lost node, and not after what would end the same."""
    chosen = [f"{key}=${{trialParameters.{name.replace('-', '_')}}}" for key, name in names.items()]
    words = [*run_words(asked, pod_spec.RUNS), TRIAL, f"sweep={asked.space.name}",
             f"tracking.sweep=katib-{asked.space.name}", *chosen]
    # Katib puts the words of a command in a row for a shell of its own, as they are: a prompt would fall apart, and
    # ${...} be the shell's. A command that is a shell's already it leaves in one piece, and only adds to its end.
    command = shlex.join(["python", "-m", "dreambooth.train", *words])
    container = pod_spec.container(asked.image, ["sh", "-c"], [command])
    return {
        "apiVersion": "batch/v1", "kind": "Job",
        "spec": {
            "backoffLimit": 5,
            "podFailurePolicy": {"rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {
                    "containerName": CONTAINER, "operator": "In", "values": HOPELESS}}]},
            "template": {"spec": {
                "restartPolicy": "Never", "serviceAccountName": pod_spec.ACCOUNT, "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": pod_spec.SAVING, "securityContext": pod_spec.security(),
                **pod_spec.placement(asked.hardware), "volumes": pod_spec.volumes(),
                "containers": [{"name": CONTAINER, **container, "resources": pod_spec.resources(asked.hardware)}]}}}}
