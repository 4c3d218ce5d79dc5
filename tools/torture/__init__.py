"""Runs that are killed, damaged, starved and stopped on purpose: `make torture` writes the outcomes to docs/torture.md.

Main files: __main__.py (the command), trial.py (one trial), report.py, kills.py, damage.py, limits.py (disk, inodes,
file handles), servers.py (MLflow), stops.py (SIGTERM) and users.py (two users of one group).
"""
