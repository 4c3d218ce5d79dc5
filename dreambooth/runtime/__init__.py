"""What a run computes with: devices and processes (engine.py), measured memory, out-of-memory advice, CPU tuning.

May import `errors`, `utils` and `config`.
"""
