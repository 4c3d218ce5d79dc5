"""How the image runs a job: SageMaker's training contract, anywhere. No Hydra; torch in `launch` only."""
