"""Hydra launcher `sagemaker`: runs the jobs of a sweep on SageMaker, in containers on this machine, or in this process.

Hydra imports this package and launcher.py at every start. Both therefore import neither heavy libraries nor the package
dreambooth.
"""
