"""Sweeps: their trials read from run folders, the summary table, an HTML page, promotion, and Hydra's callbacks.

Imports only from evaluation, inference and the folders that those may import.
"""
