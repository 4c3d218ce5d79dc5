"""Evaluation: measures (metrics.py), encoders, scoring of images, and the evaluated steps of a run (evaluator.py).

Imports only from errors, utils, config, runtime, storage, models, data, serialization, runs and tracking.
"""
