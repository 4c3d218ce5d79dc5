"""A run on disk: its folder (run_folder.py), its identity (identity.py), checkpoints, reports, and its copy in S3.

Imports only from errors, utils, config, runtime, storage, models, optim, data and serialization.
"""
