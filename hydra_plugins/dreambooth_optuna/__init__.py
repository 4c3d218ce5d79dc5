"""Hydra sweeper `optuna`: Optuna chooses the settings of each trial of a sweep, from the results of earlier trials.

Hydra imports this package and sweeper.py at every start. Both therefore import neither Optuna nor the package
dreambooth.
"""
