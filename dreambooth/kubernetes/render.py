"""Renders the objects of all workflow files as YAML."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dreambooth.kubernetes import argo, katib, kfp_pipeline, kustomize, serving, trainjob
from dreambooth.kubernetes.workflow_spec import WorkflowSpec

HEADER = "# Written from conf/ by python -m dreambooth.workflows render, which overwrites what is changed here.\n"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """YAML dumper that writes no anchors, and writes multi-line strings as block literals."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _represent_text)


def render_files(spec: WorkflowSpec) -> dict[str, str]:
    """Return the content (YAML) of all workflow files: a dictionary from path, relative to workflows/, to content."""
    files: Mapping[str, Sequence[dict[str, Any]]] = {
        "argo/kustomization.yaml": [kustomize.build_argo_kustomization()],
        f"argo/{argo.TRAIN}.yaml": [argo.build_train_template(spec)],
        f"argo/{argo.SWEEP}.yaml": [argo.build_sweep_template(spec)],
        f"argo/{argo.NIGHTLY}.yaml": [argo.build_nightly_workflow(spec)],
        "base/kustomization.yaml": [kustomize.build_base_kustomization()],
        "base/namespace.yaml": kustomize.build_namespace(),
        "base/rbac.yaml": kustomize.build_rbac(),
        "base/volume.yaml": kustomize.build_volume(),
        **{f"overlays/{name}/kustomization.yaml": [kustomize.build_overlay(spec, machine)]
           for name, machine in spec.overlays.items()},
        "kubeflow/trainjob.yaml": [trainjob.build_trainjob(spec)],
        **({"kubeflow/trainjob-4gpu.yaml": [trainjob.build_multi_gpu_trainjob(spec)],
            "kubeflow/trainjob-2nodes.yaml": [trainjob.build_multi_node_trainjob(spec)]}
           if spec.hardware.name in trainjob.MULTI_GPU_MACHINES else {}),
        "kubeflow/katib-experiment.yaml": [katib.build_experiment(spec)],
        "kubeflow/pipeline.yaml": kfp_pipeline.build_pipeline(spec),
        "serving/deployment.yaml": serving.build_deployment(spec),
        "serving/inferenceservice.yaml": [serving.build_inference_service(spec)],
    }
    return {path: HEADER + dump_yaml(documents) for path, documents in files.items()}


def dump_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """Return documents as the YAML of a workflow file, without its header."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=False)
    return text
