"""Predicts the memory, time and price of a run (rehearsal.py, report.py), and chooses memory options (auto_memory.py).

Imports from every other folder; only the commands at the root import it.
"""
