"""Workflow files for Kubernetes, generated from conf/: Argo, Kubeflow Trainer, Katib, Kubeflow Pipelines, kustomize.

Files are built as dicts, which render.py writes as YAML; there are no text templates. May import container and the
folders to its left; imports neither Hydra nor torch.
"""
