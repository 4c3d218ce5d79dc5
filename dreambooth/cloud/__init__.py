"""Jobs on other machines: the SageMaker request, the backends (SageMaker, Docker), following jobs, and sweep results.

Imports only from tracking and the folders that tracking may import. Imports neither Hydra nor torch.
"""
