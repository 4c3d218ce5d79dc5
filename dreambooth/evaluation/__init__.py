"""Evaluation of generated images: measures (metrics.py), encoders, scoring, and steps of a run (evaluator.py).

Imports only from errors, utils, config, runtime, storage, models, data, serialization, runs and tracking.
"""
