"""A run on disk: its folder (run_folder.py), its identity (identity.py), checkpoints, messages (report.py),
and its copy in S3 (remote_mirror.py).

Imports only from errors, utils, config, runtime, storage, models, optim, data and serialization.
"""
