"""Jobs on other machines: the SageMaker request, the backends (SageMaker, Docker), following jobs, and sweep results.

May import tracking and the folders to its left; imports neither Hydra nor torch.
"""
