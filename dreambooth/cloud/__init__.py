"""Runs on other machines: what a SageMaker training job is asked for, and how jobs are followed. No Hydra, no torch."""
