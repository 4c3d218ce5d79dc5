"""The runtime of a run: devices and processes (engine.py), measured memory, out-of-memory advice, CPU tuning.

May import `errors`, `utils` and `config`.
"""
