"""Training: the loop (loop.py), one step (step.py), its loss, checkpoints, hooks, and the setup of a run (setup.py).

May import from every other folder except planner.
"""
