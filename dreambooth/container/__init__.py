"""How the image runs a job: SageMaker's training contract, in the cloud and on a laptop. No Hydra, no torch."""
