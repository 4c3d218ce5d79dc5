"""Where Hydra looks for `hydra/launcher=sagemaker`. The launcher itself is not here yet.

Hydra executes this package at every start: nothing heavy is imported here, and nothing of dreambooth.
"""
