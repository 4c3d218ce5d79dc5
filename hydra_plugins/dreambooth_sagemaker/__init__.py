"""`hydra/launcher=sagemaker`: runs the jobs of a sweep on SageMaker, in containers on this machine, or in this process.

Hydra executes this package at every start, so it imports nothing heavy, and nothing of dreambooth.
"""
