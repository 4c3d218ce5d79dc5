"""Training: the loop (loop.py), the training step (step.py), the loss, checkpoints, hooks and run setup (setup.py).

May import from every other folder except planner.
"""
