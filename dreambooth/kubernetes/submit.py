"""Sends a workflow to a cluster: Argo through hera, Kubeflow through its own SDK; what is sent is as rendered."""

import json
import os
from contextlib import suppress
from typing import Any

from dreambooth.errors import UserError
from dreambooth.kubernetes import argo, katib, trainjob
from dreambooth.kubernetes.workflow_spec import Asked

KINDS = ("train", "sweep", "trainjob", "trainjob-multi", "katib")
NEEDS = "needs a package: pip install 'dreambooth[workflows]'"
SERVER, TOKEN = "ARGO_SERVER", "ARGO_TOKEN"  # as the argo command has them


def submit(asked: Asked, what: str, namespace: str, name: str | None = None) -> str:
    """Submit, and say what was made.

    Raises:
        UserError: a package or the cluster's address is missing, or the cluster refuses.
    """
    if what in ("train", "sweep"):
        return f"workflow {_argo(asked, what, namespace)} in {namespace}"
    made = {"trainjob": trainjob.single, "trainjob-multi": trainjob.multi, "katib": katib.experiment}[what](asked)
    if name:
        made["metadata"]["name"] = name
    return f"{made['kind']} {_kubeflow(made, namespace)} in {namespace}"


def _argo(asked: Asked, what: str, namespace: str) -> str:
    """A Workflow of the template that the cluster holds, with these overrides."""
    try:
        from hera.workflows import WorkflowsService
        from hera.workflows.models import WorkflowSubmitRequest
    except ImportError as error:
        raise UserError(f"--what {what} {NEEDS}") from error
    if not (host := os.environ.get(SERVER)):
        raise UserError(f"the address of Argo's server is missing: set {SERVER}=https://HOST:2746 and {TOKEN}")
    parameters = {"image": asked.image, "overrides": asked.typed}
    if what == "sweep":
        parameters["sweep"] = asked.space.name
    request = WorkflowSubmitRequest.model_validate({
        "namespace": namespace, "resourceKind": "WorkflowTemplate",
        "resourceName": argo.SWEEP if what == "sweep" else argo.TRAIN,
        "submitOptions": {"parameters": [f"{key}={value}" for key, value in parameters.items()]}})
    try:
        service = WorkflowsService(host=host, token=os.environ.get(TOKEN), namespace=namespace)
        made = service.submit_workflow(request, namespace=namespace)
    except Exception as error:  # hera has one class an HTTP status, requests its own
        raise UserError(f"Argo at {host} did not take the workflow ({_short(error)})") from error
    return str(made.metadata.name)


def _kubeflow(made: dict[str, Any], namespace: str) -> str:
    """Create a TrainJob or an Experiment through the Kubeflow SDK's connection to the cluster."""
    try:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient
    except ImportError as error:
        raise UserError(f"--what trainjob {NEEDS}") from error
    group, version = made["apiVersion"].split("/")
    try:
        api = TrainerClient(KubernetesBackendConfig(namespace=namespace)).backend.custom_api
        answer = api.create_namespaced_custom_object(group, version, namespace, f"{made['kind'].lower()}s", made)
    except Exception as error:
        raise UserError(f"the cluster did not take the {made['kind']} ({_short(error)}): look with kubectl, and at "
                        "KUBECONFIG") from error
    return str(answer["metadata"]["name"])


def _short(error: Exception) -> str:
    """What a server said, or the first words of the error."""
    cause = error.__cause__ if getattr(error, "body", None) is None and error.__cause__ else error
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(getattr(cause, "body", ""))["message"] or getattr(cause, "reason", ""))
    return " ".join(str(error).split())[:300]
