"""Every workflow file by its path, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dreambooth.kubernetes import argo, katib, kfp_pipeline, kustomize, trainjob
from dreambooth.kubernetes.workflow_spec import Asked

HEAD = "# Written from conf/ by python -m dreambooth.workflows render, which overwrites what is changed here.\n"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """No anchors; texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def rendered(asked: Asked) -> dict[str, str]:
    """path below workflows/ -> text."""
    documents: Mapping[str, Sequence[dict[str, Any]]] = {
        "argo/kustomization.yaml": [kustomize.templates()],
        f"argo/{argo.TRAIN}.yaml": [argo.train(asked)],
        f"argo/{argo.SWEEP}.yaml": [argo.sweep(asked)],
        f"argo/{argo.NIGHTLY}.yaml": [argo.nightly(asked)],
        "base/kustomization.yaml": [kustomize.base()],
        "base/namespace.yaml": kustomize.namespace(),
        "base/rbac.yaml": kustomize.rbac(),
        "base/volume.yaml": kustomize.volume(),
        **{f"overlays/{name}/kustomization.yaml": [kustomize.overlay(asked, other)]
           for name, other in asked.machines.items()},
        "kubeflow/trainjob.yaml": [trainjob.single(asked)],
        **({"kubeflow/trainjob-4gpu.yaml": [trainjob.multi(asked)]} if asked.hardware.name in trainjob.LARGER else {}),
        "kubeflow/katib-experiment.yaml": [katib.experiment(asked)],
        "kubeflow/pipeline.yaml": kfp_pipeline.pipeline(asked),
    }
    return {path: HEAD + yaml.dump_all(found, Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=False)
            for path, found in documents.items()}
