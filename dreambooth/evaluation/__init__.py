"""Evaluation of generated images: measures (metrics.py), image encoders, scoring, and evaluator.py, which uses them.

Imports only from errors, utils, config, runtime, storage, models, data, serialization, runs and tracking.
"""
