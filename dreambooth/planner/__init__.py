"""Predicts the memory, time and price of a run (rehearsal.py, report.py), and chooses memory options (auto_memory.py).

Imports only from training and the folders that training may import. Only the modules at the root of the package import
the planner.
"""
