"""Makes the SageMaker SDK's ModelTrainer of a run, which sends the same request as the launcher."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from dreambooth.cloud import job_preparation, sagemaker_sdk
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.config.launcher import compose_job
from dreambooth.errors import ConfigError

ROLE_CHECK = "SAGEMAKER_VALIDATE_ROLE"  # environment variable that switches off the SDK's check of the role
EXPRESSED = {  # the parts of a request that a ModelTrainer has
    "training_job_name", "role_arn", "algorithm_specification", "hyper_parameters", "output_data_config",
    "checkpoint_config", "resource_config", "stopping_condition", "environment", "tags", "input_data_config",
    "enable_managed_spot_training", "retry_strategy", "vpc_config", "enable_network_isolation",
    "enable_inter_container_traffic_encryption"}


def build_trainer(overrides: Sequence[str], sweep: str | None = None, session: Any = None) -> Any:
    """Return a ModelTrainer of the SageMaker SDK. See `dreambooth.cloud.model_trainer`."""
    sagemaker_sdk.mute_logs()
    sagemaker_sdk.load_resources()
    composed = compose_job(overrides)
    sweep = sweep or composed.launcher["sweep"] or time.strftime("train-%Y%m%d-%H%M%S")
    if not job_preparation.is_sweep_name(sweep):
        raise ConfigError(f"the name of a sweep must be 1 to 40 letters, digits and hyphens, not {sweep}")
    if composed.launcher["mode"] != "aws":
        raise ConfigError("a ModelTrainer runs on AWS: leave hydra.launcher.mode out, or type python -m "
                          "dreambooth.train -m hydra/launcher=sagemaker for the other modes")
    problems = job_preparation.find_credentials([composed], sweep)
    try:
        if problems:
            raise ConfigError(*problems)
        job_preparation.check_numbers([composed.launcher])
        backend = SageMakerBackend()
        [job] = job_preparation.prepare_jobs([composed], sweep, backend, "aws")
    except ConfigError as error:
        raise ConfigError(*(problem.removeprefix("job 0: ") for problem in error.problems)) from None
    print("\n".join(job_preparation.describe_jobs([job])), flush=True)
    request = sagemaker_sdk.typed_request(job.request, backend.request_shape)
    from boto3.session import Session

    if session is None:  # with a boto3 session of its own: the SDK keeps the client, and its login, of a shared one
        session = sagemaker_sdk.open_session(boto_session=Session())
    with _without_role_check():
        return _to_trainer(request, session)


def _to_trainer(request: Any, session: Any) -> Any:
    """Return the ModelTrainer that sends a request.

    Args:
        request: the typed request, from `sagemaker_sdk.typed_request`.
    """
    from sagemaker.core.training.configs import Compute, Networking

    if unknown := sorted(request.model_fields_set - EXPRESSED):
        raise ConfigError(f"the SDK's ModelTrainer has no place for {', '.join(unknown)}: use the launcher, python -m "
                          "dreambooth.train -m hydra/launcher=sagemaker")
    algorithm, resources = request.algorithm_specification, request.resource_config
    networking = {name: getattr(request, name) for name in
                  ("enable_network_isolation", "enable_inter_container_traffic_encryption")
                  if name in request.model_fields_set}
    if request.vpc_config:
        networking |= {"subnets": request.vpc_config.subnets,
                       "security_group_ids": request.vpc_config.security_group_ids}
    trainer = _trainer_class()(
        sagemaker_session=session,
        role=request.role_arn,
        base_job_name=request.training_job_name,
        training_image=algorithm.training_image,
        training_input_mode=algorithm.training_input_mode,
        hyperparameters=dict(request.hyper_parameters),
        environment=dict(request.environment),
        compute=Compute(**{name: getattr(resources, name) for name in resources.model_fields_set},
                        enable_managed_spot_training=request.enable_managed_spot_training or None),
        networking=Networking(**networking) if networking else None,
        stopping_condition=request.stopping_condition,
        input_data_config=request.input_data_config or None,
        output_data_config=request.output_data_config,
        checkpoint_config=request.checkpoint_config,
        tags=[tag.model_dump() for tag in request.tags])  # the SDK has two classes Tag
    trainer.with_metric_definitions(algorithm.metric_definitions)
    if request.retry_strategy:
        trainer.with_retry_strategy(request.retry_strategy)
    return trainer


@cache
def _trainer_class() -> Any:
    """Return a subclass of ModelTrainer that gives its job the name `base_job_name`, without a timestamp.

    The name identifies the run. SageMaker refuses a second job of the same name, so that no run is paid for twice.
    """
    from sagemaker.train import ModelTrainer

    class RunTrainer(ModelTrainer):  # type: ignore[misc]
        def _create_training_job_args(self, *args: Any, **options: Any) -> dict[str, Any]:
            request: dict[str, Any] = super()._create_training_job_args(*args, **options)
            return request | {key: self.base_job_name for key in ("training_job_name", "TrainingJobName")
                              if key in request}

    return RunTrainer


@contextmanager
def _without_role_check() -> Iterator[None]:
    """Switch off the SDK's check of the role, unless the user has set the environment variable.

    The check asks IAM whether the role may do everything that any trainer of the SDK does, such as call Lambda
    functions. It refuses the role of docs/sagemaker.md, which has only the permissions that a job needs.
    """
    before = os.environ.get(ROLE_CHECK)
    os.environ.setdefault(ROLE_CHECK, "false")
    try:
        yield
    finally:
        if before is None:
            del os.environ[ROLE_CHECK]
