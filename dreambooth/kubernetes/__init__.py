"""Workflow files for Kubernetes, generated from conf/: Argo, Kubeflow Trainer, Katib, Kubeflow Pipelines, kustomize.

Functions build the files as dicts, and render.py writes the dicts as YAML. There are no text templates. May import
container and the folders that container may import. Imports neither Hydra nor torch.
"""
