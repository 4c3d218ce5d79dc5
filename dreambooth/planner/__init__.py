"""Predicts the memory, time and price of a run (rehearsal.py, report.py), and chooses memory options (auto_memory.py).

May import from every other folder. Only the commands at the root import it.
"""
