"""Builds a sweep as a SageMaker Pipeline with the SageMaker SDK, from the requests of pipeline_requests.py.

The SDK is imported when a pipeline is built. Building makes no call to AWS and needs no credentials.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from dreambooth.cloud import pipeline_requests as requests
from dreambooth.cloud import sagemaker_sdk
from dreambooth.cloud.pipeline_requests import SageMakerSpec
from dreambooth.errors import UserError

NAME = "dreambooth-sweep"
# Other texts in << >>, such as <<zwx>> in a prompt, are the user's own and stay as they are.
REFERENCE = re.compile(rf"<<((?:Parameters|{requests.BEST})\.[\w.-]+|{re.escape(requests.EXECUTION)})>>")
# The SDK creates a client when it is imported. The client needs a region, and would look for credentials on EC2.
IMPORT_ENVIRONMENT = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


class MissingPackage(UserError):
    """The SageMaker SDK is not installed."""


def build_pipeline(spec: SageMakerSpec, session: Any = None) -> Any:
    """Build the pipeline: validate -> one training step per trial -> choose -> register.

    A failed trial does not stop the choice of the best among the others.

    Args:
        session: a session of the SDK; None: the pipeline can only be rendered. For a LocalPipelineSession, which
            executes a pipeline with Docker on this machine, the pipeline is built without two things that local mode
            does not have: the step `register`, and steps that run after a failed step.

    Returns:
        A Pipeline of the SDK (sagemaker.mlops.workflow.pipeline).

    Raises:
        MissingPackage: the SDK is not installed.
    """
    sagemaker_sdk.mute_logs()
    with _import_environment():
        try:
            from sagemaker.core.workflow.execution_variables import ExecutionVariables
            from sagemaker.core.workflow.functions import Join, JsonGet, PropertyFile
            from sagemaker.core.workflow.parameters import ParameterString
            from sagemaker.core.workflow.properties import Properties
            from sagemaker.mlops.workflow import retry
            from sagemaker.mlops.workflow.pipeline import Pipeline
            from sagemaker.mlops.workflow.step_dependency import StepDependency, TriggerCondition
            from sagemaker.mlops.workflow.steps import ConfigurableRetryStep, StepTypeEnum
        except ImportError as error:
            raise MissingPackage("a SageMaker Pipeline needs a package: pip install 'dreambooth[aws]'") from error

    class JobStep(ConfigurableRetryStep):  # type: ignore[misc]
        """A step that sends one request to the service, as it is."""

        def __init__(self, name: str, kind: Any, request: Mapping[str, Any], shape: str, **more: Any) -> None:
            super().__init__(name, kind, **more)
            self._request = request
            self._properties = Properties(step_name=name, step=self, shape_name=shape)
            self.property_files: list[Any] = []

        @property
        def arguments(self) -> Any:
            return convert(self._request)

        @property
        def properties(self) -> Any:
            return self._properties

        def to_request(self) -> dict[str, Any]:
            files = [file.expr for file in self.property_files]
            request: dict[str, Any] = super().to_request()
            return request | ({"PropertyFiles": files} if files else {})

    local = bool(getattr(session, "local_mode", False))
    parameters = {name: ParameterString(name=name, default_value=default)
                  for name, default in requests.parameters(spec).items()}
    best = PropertyFile(name=requests.BEST, output_name=requests.CHOOSE, path=requests.BEST_FILE)

    def variable(name: str) -> Any:
        if name == requests.EXECUTION:
            return ExecutionVariables.PIPELINE_EXECUTION_ID
        scope, _, rest = name.partition(".")
        if scope == requests.BEST:
            return JsonGet(step_name=requests.CHOOSE, property_file=best, json_path=rest)
        return parameters[rest]

    def convert(value: Any) -> Any:
        """Replace the references in a request by variables of the SDK."""
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list):
            return [convert(item) for item in value]
        if not isinstance(value, str) or not REFERENCE.search(value):
            return value
        # split() returns texts at even positions and names of references at odd positions
        parts = [variable(part) if number % 2 else part for number, part in enumerate(REFERENCE.split(value))]
        parts = [part for part in parts if part != ""]
        return parts[0] if len(parts) == 1 else Join(on="", values=parts)

    policies = [
        retry.StepRetryPolicy([retry.StepExceptionTypeEnum.SERVICE_FAULT, retry.StepExceptionTypeEnum.THROTTLING],
                              max_attempts=5),
        retry.SageMakerJobStepRetryPolicy(
            [retry.SageMakerJobExceptionTypeEnum.RESOURCE_LIMIT],
            [retry.SageMakerJobExceptionTypeEnum.INTERNAL_ERROR, retry.SageMakerJobExceptionTypeEnum.CAPACITY_ERROR],
            interval_seconds=60, max_attempts=5)]
    validate = JobStep(requests.VALIDATE, StepTypeEnum.PROCESSING, requests.validate_request(spec),
                       "DescribeProcessingJobResponse", retry_policies=policies)
    trials = [JobStep(name, StepTypeEnum.TRAINING, request, "DescribeTrainingJobResponse", depends_on=[validate],
                      retry_policies=policies)
              for name, request in requests.training_requests(spec)]
    choose = JobStep(requests.CHOOSE, StepTypeEnum.PROCESSING, requests.choose_request(local),
                     "DescribeProcessingJobResponse", retry_policies=policies,
                     depends_on=trials if local else [StepDependency(trial, TriggerCondition.ANY) for trial in trials])
    choose.property_files.append(best)
    steps = [validate, *trials, choose]
    if not local:
        steps.append(JobStep(requests.REGISTER, StepTypeEnum.REGISTER_MODEL, requests.register_request(),
                             "DescribeModelPackageOutput", depends_on=[choose], retry_policies=policies[:1]))
    return Pipeline(NAME, parameters=list(parameters.values()), steps=steps, pipeline_experiment_config=None,
                    sagemaker_session=session or _rendering_session())


def render_pipeline(spec: SageMakerSpec) -> str:
    """Return the definition of the pipeline as JSON. The definition does not depend on an account or a region."""
    definition = json.loads(build_pipeline(spec).definition())
    return json.dumps({key: value for key, value in definition.items() if value is not None}, indent=1) + "\n"


def _rendering_session() -> Any:
    """Return a stand-in for a session of the SDK. A real session would read defaults, possibly from S3."""
    return SimpleNamespace(boto_session=SimpleNamespace(client=lambda service: None), boto_region_name="us-east-1",
                           local_mode=False)


@contextmanager
def _import_environment() -> Iterator[None]:
    added = {key: value for key, value in IMPORT_ENVIRONMENT.items() if key not in os.environ}
    if "AWS_REGION" in os.environ:
        added.pop("AWS_DEFAULT_REGION", None)
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
