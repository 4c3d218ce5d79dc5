"""Plain Kubernetes objects around workflows, and kustomizations: a base, and an overlay a machine."""

from typing import Any

import yaml

from dreambooth.kubernetes import argo, pod_spec
from dreambooth.kubernetes.workflow_spec import Asked

NAMESPACE = "dreambooth"
SUBMITTER = "dreambooth-submitter"
KUSTOMIZE = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


def rbac() -> list[dict[str, Any]]:
    """What a workflow's pods may do (say how they ended), and what a person needs who submits."""
    executor = [{"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}]
    person = [
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
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": pod_spec.ACCOUNT}},
        _role(pod_spec.ACCOUNT, executor),
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": pod_spec.ACCOUNT},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": pod_spec.ACCOUNT},
         "subjects": [{"kind": "ServiceAccount", "name": pod_spec.ACCOUNT, "namespace": NAMESPACE}]},
        _role(SUBMITTER, person),
    ]


def _role(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name}, "rules": rules}


def volume() -> list[dict[str, Any]]:
    """The volume of runs: runs of a sweep on several nodes share it."""
    return [{
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": pod_spec.CLAIM},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "200Gi"}}}}]


def namespace() -> list[dict[str, Any]]:
    """Where all of it lives."""
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {
        "name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "baseline"}}}]


def base() -> dict[str, Any]:
    return KUSTOMIZE | {"namespace": NAMESPACE,
                        "resources": ["namespace.yaml", "rbac.yaml", "volume.yaml", "../argo"]}


def templates() -> dict[str, Any]:
    return KUSTOMIZE | {"resources": [f"{name}.yaml" for name in (argo.TRAIN, argo.SWEEP)]}


def overlay(before: Asked, after: Asked) -> dict[str, Any]:
    """The base for another machine: what differs between the same templates, as JSON patches."""
    patches = []
    for render in (argo.train, argo.sweep):
        old, new = render(before), render(after)
        changes = list(_changes(old, new, ""))
        if changes:
            patches.append({"target": {"kind": old["kind"], "name": old["metadata"]["name"]},
                            "patch": _dumped(changes)})
    return KUSTOMIZE | {"resources": ["../../base"], **({"patches": patches} if patches else {})}


def _changes(old: Any, new: Any, path: str) -> list[dict[str, Any]]:
    """RFC 6902 operations that make one of the other; lists of the same length go item by item."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                found.append({"op": "remove", "path": place})
            elif key not in old:
                found.append({"op": "add", "path": place, "value": new[key]})
            else:
                found += _changes(old[key], new[key], place)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [change for i, (one, other) in enumerate(zip(old, new, strict=True))
                for change in _changes(one, other, f"{path}/{i}")]
    return [{"op": "replace", "path": path, "value": new}]


def _dumped(changes: list[dict[str, Any]]) -> str:
    """kustomize takes a patch as a text."""
    text: str = yaml.safe_dump(changes, sort_keys=False, width=120)
    return text
