"""Optimizers, learning-rate schedules, the EMA (ema.py) and the memory levers (memory_levers.py).

Imports only from errors, utils, config, runtime, storage and models.
"""
