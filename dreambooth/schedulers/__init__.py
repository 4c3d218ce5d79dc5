"""Job files for schedulers other than Kubernetes and SageMaker, generated from conf/: Slurm and SkyPilot.

May import kubernetes and the folders that kubernetes may import. Imports neither Hydra nor torch.
"""
