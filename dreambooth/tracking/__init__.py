"""Experiment tracking: the journal of a run, MLflow (tracker, shipper, model registry), and SVG charts of metrics.

May import runs and the folders to its left; nothing outside this folder imports MLflow.
"""
