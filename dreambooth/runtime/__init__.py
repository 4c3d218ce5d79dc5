"""How a run computes: devices and processes (engine.py), memory by phase, out-of-memory advice, CPU tuning.

May import `errors`, `utils` and `config`.
"""
