"""Workflow files for Kubernetes, made from conf/: Argo, Kubeflow Trainer, Katib, Kubeflow Pipelines, kustomize.

Files are built as dicts and dumped as YAML in render.py; none is a text template. May import folders from errors to
container; no Hydra, no torch.
"""
