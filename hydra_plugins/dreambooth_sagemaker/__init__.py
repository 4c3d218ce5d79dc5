"""`hydra/launcher=sagemaker`: the jobs of a sweep on SageMaker, in containers of this machine, or in this process.

Hydra executes this package at every start: nothing heavy is imported here, and nothing of dreambooth.
"""
