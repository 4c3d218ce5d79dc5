"""What runs inside the image: the SageMaker training contract, the processes that train, the published model.

Hyperparameters (hyperparameters.py), folders (sagemaker_paths.py), hosts and GPUs (cluster.py), the child process
(supervisor.py). May import folders from errors to cloud; no Hydra, and torch in torchrun.py only.
"""
