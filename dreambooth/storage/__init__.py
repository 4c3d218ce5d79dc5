"""S3 storage: uploads and downloads of folders (folders.py), and the S3 inputs of a run (run_inputs.py).

Imports only from errors, utils, config and runtime; the command in `__main__.py` also imports dreambooth/cli.py.
"""
