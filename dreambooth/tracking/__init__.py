"""Experiment tracking: the journal of a run, MLflow (trackers, shipper, model registry), and SVG charts of metrics.

Imports only from runs and the folders that runs may import. Nothing outside this folder imports MLflow.
"""
