"""Predicts the memory, time and price of a run (rehearsal.py, report.py), and chooses memory options (auto_memory.py).

May import from every other folder. Only the command modules in the root folder of the package import it.
"""
