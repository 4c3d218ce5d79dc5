"""Submits a rendered workflow to a cluster: to Argo with the package hera, to Kubeflow with the Kubeflow SDK."""

import json
import os
from contextlib import suppress
from typing import Any

from dreambooth.errors import UserError
from dreambooth.kubernetes import argo, katib, trainjob
from dreambooth.kubernetes.workflow_spec import WorkflowSpec

KINDS = ("train", "sweep", "trainjob", "trainjob-multi", "trainjob-nodes", "katib")
QUEUED = ("trainjob", "trainjob-multi", "trainjob-nodes", "katib")  # those whose labels name a queue of Kueue
MISSING_PACKAGE = "needs a package: pip install 'dreambooth[workflows]'"
ARGO_SERVER, ARGO_TOKEN = "ARGO_SERVER", "ARGO_TOKEN"  # environment variables that the argo command also reads


def submit(spec: WorkflowSpec, kind: str, namespace: str, name: str | None = None) -> str:
    """Submit a workflow and return a sentence that names the created object.

    Args:
        kind: one of KINDS.
        name: name of the TrainJob or Experiment; None: the name in the workflow file. For Argo, `name` is ignored,
            because Argo generates a name.

    Raises:
        UserError: a package is not installed, the environment variable ARGO_SERVER is missing for an Argo workflow, or
            the cluster rejects the workflow.
    """
    if kind in ("train", "sweep"):
        return f"workflow {_submit_to_argo(spec, kind, namespace)} in {namespace}"
    builders = {"trainjob": trainjob.build_trainjob, "trainjob-multi": trainjob.build_multi_gpu_trainjob,
                "trainjob-nodes": trainjob.build_multi_node_trainjob, "katib": katib.build_experiment}
    manifest = builders[kind](spec)
    if name:
        manifest["metadata"]["name"] = name
    return f"{manifest['kind']} {_create_kubeflow_object(manifest, namespace)} in {namespace}"


def _submit_to_argo(spec: WorkflowSpec, kind: str, namespace: str) -> str:
    """Submit a Workflow that Argo creates from the WorkflowTemplate in the cluster. Return the Workflow's name.

    The image and the overrides of `spec` are the parameters of the Workflow. For a sweep, the name of the search space
    is another parameter.
    """
    try:
        from hera.workflows import WorkflowsService
        from hera.workflows.models import WorkflowSubmitRequest
    except ImportError as error:
        raise UserError(f"--what {kind} {MISSING_PACKAGE}") from error
    if not (host := os.environ.get(ARGO_SERVER)):
        raise UserError("the address of the Argo server is missing: "
                        f"set {ARGO_SERVER}=https://HOST:2746 and {ARGO_TOKEN}")
    parameters = {"image": spec.image, "overrides": spec.overrides_text}
    if kind == "sweep":
        parameters["sweep"] = spec.space.name
    request = WorkflowSubmitRequest.model_validate({
        "namespace": namespace, "resourceKind": "WorkflowTemplate",
        "resourceName": argo.SWEEP if kind == "sweep" else argo.TRAIN,
        "submitOptions": {"parameters": [f"{key}={value}" for key, value in parameters.items()]}})
    try:
        service = WorkflowsService(host=host, token=os.environ.get(ARGO_TOKEN), namespace=namespace)
        workflow = service.submit_workflow(request, namespace=namespace)
    except Exception as error:  # hera raises one class per HTTP status; requests raises others
        raise UserError(f"Argo at {host} rejected the workflow ({_short_message(error)}): check {ARGO_SERVER} and "
                        f"{ARGO_TOKEN}") from error
    return str(workflow.metadata.name)


def _create_kubeflow_object(manifest: dict[str, Any], namespace: str) -> str:
    """Create a TrainJob or Experiment with the Kubernetes client of the Kubeflow SDK. Return the object's name.

    Raises:
        UserError: the SDK is not installed, or the cluster rejects the object.
    """
    try:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient
    except ImportError as error:
        raise UserError(f"--what trainjob {MISSING_PACKAGE}") from error
    group, version = manifest["apiVersion"].split("/")
    try:
        api = TrainerClient(KubernetesBackendConfig(namespace=namespace)).backend.custom_api
        created = api.create_namespaced_custom_object(
            group, version, namespace, f"{manifest['kind'].lower()}s", manifest)
    except Exception as error:
        raise UserError(f"the cluster rejected the {manifest['kind']} ({_short_message(error)}): check "
                        "KUBECONFIG, and the cluster with kubectl") from error
    return str(created["metadata"]["name"])


def _short_message(error: Exception) -> str:
    """Return the server's message from an error.

    If the error contains no message of the server, return the first 300 characters of the error's own text.
    """
    cause = error.__cause__ if getattr(error, "body", None) is None and error.__cause__ else error
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(getattr(cause, "body", ""))["message"] or getattr(cause, "reason", ""))
    return " ".join(str(error).split())[:300]
