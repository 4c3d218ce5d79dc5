"""The files of a run: run folder (run_folder.py), identity (identity.py), checkpoints (checkpoint_files.py),
messages (report.py) and the copy in S3 (remote_mirror.py).

Imports only from errors, utils, config, runtime, storage, models, optim, data and serialization.
"""
