"""Sweeps: their trials read from run folders, the summary table, an HTML page, promotion, and Hydra's callbacks.

May import evaluation, inference and the folders to their left.
"""
