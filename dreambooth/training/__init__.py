"""Training: the loop (loop.py), one step (step.py), its loss, checkpoints, hooks, and the setup of a run (setup.py).

Imports from every other folder but planner.
"""
