"""Code that runs a sweep's jobs on SageMaker or in Docker containers.

It builds and validates requests, submits and polls jobs through a backend, and collects the results. May import
tracking and the folders that tracking may import. Imports neither Hydra nor torch.
"""
