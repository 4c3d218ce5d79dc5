"""Workflow files from conf/: Argo, Kubeflow Trainer, Katib, Kubeflow Pipelines, kustomize. No Hydra, no torch.

Every file is a plain dict until the last moment; nothing is templated as text.
"""
