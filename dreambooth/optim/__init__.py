"""Optimizers, learning-rate schedules, the EMA (ema.py), and optimizers that save memory (memory_levers.py).

Imports only from errors, utils, config, runtime, storage and models.
"""
