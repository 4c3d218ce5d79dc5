"""Every workflow file by its path, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dreambooth.kubernetes import argo, cluster, katib, pipeline, trainjob
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
        "argo/kustomization.yaml": [cluster.templates()],
        f"argo/{argo.TRAIN}.yaml": [argo.train(asked)],
        f"argo/{argo.SWEEP}.yaml": [argo.sweep(asked)],
        f"argo/{argo.NIGHTLY}.yaml": [argo.nightly(asked)],
        "base/kustomization.yaml": [cluster.base()],
        "base/namespace.yaml": cluster.namespace(),
        "base/rbac.yaml": cluster.rbac(),
        "base/volume.yaml": cluster.volume(),
        **{f"overlays/{name}/kustomization.yaml": [cluster.overlay(asked, other)]
           for name, other in asked.machines.items()},
        "kubeflow/trainjob.yaml": [trainjob.single(asked)],
        **({"kubeflow/trainjob-4gpu.yaml": [trainjob.multi(asked)]} if asked.hardware.name in trainjob.LARGER else {}),
        "kubeflow/katib-experiment.yaml": [katib.experiment(asked)],
        "kubeflow/pipeline.yaml": pipeline.pipeline(asked),
    }
    return {path: HEAD + yaml.dump_all(found, Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=False)
            for path, found in documents.items()}
