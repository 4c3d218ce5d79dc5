"""Builds the files for kustomize: a base with namespace, roles and volume, and one overlay per machine."""

from typing import Any

import yaml

from dreambooth.kubernetes import argo, pod_spec, serving
from dreambooth.kubernetes.workflow_spec import WorkflowSpec

NAMESPACE = "dreambooth"
SUBMITTER_ROLE = "dreambooth-submitter"
RBAC_API_VERSION = "rbac.authorization.k8s.io/v1"
KUSTOMIZATION = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


def build_argo_kustomization() -> dict[str, Any]:
    """Build the kustomization that lists the WorkflowTemplates for Argo."""
    return KUSTOMIZATION | {"resources": [f"{name}.yaml" for name in (argo.TRAIN, argo.SWEEP)]}


def build_base_kustomization() -> dict[str, Any]:
    """Build the base kustomization, which lists the objects that are the same for all machines."""
    return KUSTOMIZATION | {"namespace": NAMESPACE,
                            "resources": ["namespace.yaml", "rbac.yaml", "volume.yaml", "../argo"]}


def build_namespace() -> list[dict[str, Any]]:
    """Build the Kubernetes namespace that contains all other objects of the base kustomization."""
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {
        "name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "baseline"}}}]


def build_rbac() -> list[dict[str, Any]]:
    """Build the service account of workflow pods with its role, and a role for users who submit workflows."""
    pod_rules = [{"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]},
                 {"apiGroups": ["apps"], "resources": ["deployments"], "resourceNames": [serving.NAME],
                  "verbs": ["get", "patch"]}]  # the stage `deploy` of a sweep
    submitter_rules = [
        {"apiGroups": ["argoproj.io"], "resources": ["workflows", "workflowtemplates", "cronworkflows"],
         "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"]},
        {"apiGroups": ["trainer.kubeflow.org"], "resources": ["trainjobs"],
         "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
        {"apiGroups": ["trainer.kubeflow.org"], "resources": ["trainingruntimes", "clustertrainingruntimes"],
         "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["kubeflow.org"], "resources": ["experiments", "trials", "suggestions"],
         "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
        {"apiGroups": [""], "resources": ["pods", "pods/log", "events"], "verbs": ["get", "list", "watch"]},
    ]
    account = pod_spec.SERVICE_ACCOUNT
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}},
        _role(account, pod_rules),
        {"apiVersion": RBAC_API_VERSION, "kind": "RoleBinding", "metadata": {"name": account},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
         "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]},
        _role(SUBMITTER_ROLE, submitter_rules),
    ]


def _role(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"apiVersion": RBAC_API_VERSION, "kind": "Role", "metadata": {"name": name}, "rules": rules}


def build_volume() -> list[dict[str, Any]]:
    """Build the PersistentVolumeClaim for run folders. Pods on several nodes can mount the volume."""
    return [{
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": pod_spec.CLAIM},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "200Gi"}}}}]


def build_overlay(base: WorkflowSpec, machine: WorkflowSpec) -> dict[str, Any]:
    """Build the kustomization of an overlay: JSON patches that adapt the WorkflowTemplates to a machine.

    Args:
        base: inputs of the unpatched WorkflowTemplates.
        machine: inputs of the WorkflowTemplates for the overlay's machine.
    """
    patches = []
    for build in (argo.build_train_template, argo.build_sweep_template):
        base_template = build(base)
        operations = _diff(base_template, build(machine), "")
        if operations:
            patches.append({
                "target": {"kind": base_template["kind"], "name": base_template["metadata"]["name"]},
                "patch": _dump_patch(operations)})
    return KUSTOMIZATION | {"resources": ["../../base"], **({"patches": patches} if patches else {})}


def _diff(old: Any, new: Any, path: str) -> list[dict[str, Any]]:
    """Return JSON Patch (RFC 6902) operations that turn `old` into `new`.

    Lists of equal length are compared item by item. Other lists that differ are replaced as a whole.
    """
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        operations = []
        for key in [*old, *(key for key in new if key not in old)]:
            pointer = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                operations.append({"op": "remove", "path": pointer})
            elif key not in old:
                operations.append({"op": "add", "path": pointer, "value": new[key]})
            else:
                operations += _diff(old[key], new[key], pointer)
        return operations
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [operation for i, (old_item, new_item) in enumerate(zip(old, new, strict=True))
                for operation in _diff(old_item, new_item, f"{path}/{i}")]
    return [{"op": "replace", "path": path, "value": new}]


def _dump_patch(operations: list[dict[str, Any]]) -> str:
    """Return a JSON patch as the YAML string that kustomize expects."""
    text: str = yaml.safe_dump(operations, sort_keys=False, width=120)
    return text
