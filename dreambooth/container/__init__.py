"""Code that runs inside the container image: reads the inputs of a SageMaker job and starts the training processes.

Main files: hyperparameters.py, sagemaker_paths.py (folders), cluster.py (hosts and GPUs), supervisor.py (child
processes), publish_model.py. May import cloud and the folders that cloud may import. Imports no Hydra;
only torchrun.py imports torch.
"""
