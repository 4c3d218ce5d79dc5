"""Code that runs jobs on SageMaker or in Docker containers.

It builds and validates requests, submits and polls jobs through a backend, and collects the results. May import
tracking and the folders that tracking may import. Imports neither torch nor, when it is imported, Hydra and the
SageMaker SDK.
"""

from collections.abc import Sequence
from typing import Any


def model_trainer(overrides: Sequence[str], *, sweep: str | None = None, session: Any = None) -> Any:
    """Return a ModelTrainer of the SageMaker SDK for a run, for use in a notebook or in a pipeline.

    Its method `train` sends the request that `python -m dreambooth.train -m hydra/launcher=sagemaker` would send for
    the same overrides: image, hyperparameters, channels, checkpoints, spot instances, metrics. This function makes the
    same checks as the command, uploads local folders, and prints the job and its estimated cost. It submits nothing.

    Args:
        overrides: as for the command, such as "hardware=g4dn" or "hydra.launcher.spot=true". The environment variables
            DREAMBOOTH_IMAGE, DREAMBOOTH_ROLE and DREAMBOOTH_S3 have the same effect as for the command.
        sweep: the name from which the job's name is made. SageMaker refuses a second job for the same run and sweep.
            None: hydra.launcher.sweep, or else a new name, made from the time.
        session: session of the SDK that sends the request, such as a PipelineSession; None: a new one.

    Raises:
        ConfigError: the run has problems; the message has one line per problem.
        UserError: the SDK is not installed, Hydra cannot compose the overrides, or AWS does not answer.
    """
    from dreambooth.cloud.trainer import build_trainer

    return build_trainer(overrides, sweep, session)
