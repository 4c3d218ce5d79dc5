"""Submits a sweep to SageMaker: as a pipeline, or as a hyperparameter tuning job."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from dreambooth.cloud import pipeline_requests as requests
from dreambooth.cloud import request_validation, sagemaker_pipeline, secrets
from dreambooth.cloud.pipeline_requests import SageMakerSpec
from dreambooth.cloud.sagemaker_tuner import build_tuning_request
from dreambooth.errors import ConfigError, UserError
from dreambooth.storage import aws_errors, folders

PIPELINE, TUNER = "pipeline", "tuner"
KINDS = (PIPELINE, TUNER)
PARALLEL_STEPS = 4
SETTINGS = {  # environment variable -> example
    "DREAMBOOTH_ROLE": "arn:aws:iam::ACCOUNT:role/NAME", "DREAMBOOTH_S3": "s3://BUCKET/FOLDER",
    "DREAMBOOTH_IMAGE": "ACCOUNT.dkr.ecr.REGION.amazonaws.com/dreambooth:TAG"}
T = TypeVar("T")


def submit(spec: SageMakerSpec, kind: str, name: str | None = None) -> str:
    """Submit a sweep and return a sentence that names what was started.

    The role of the jobs, the S3 folder for results and the image are read from the environment variables in SETTINGS,
    which the launcher reads too. An image with a registry in `spec` takes precedence.

    Args:
        kind: one of KINDS.
        name: name of the pipeline or of the tuning job; None: the name in the workflow file. A pipeline that exists
            is updated. A tuning job needs a name that no other tuning job has had.

    Raises:
        UserError: the machine has no SageMaker instance type, an environment variable is missing, a request contains a
            credential or would be rejected, or AWS rejects it.
    """
    spec.require_instance_type()
    values = {key: os.environ.get(key, "").rstrip("/") for key in SETTINGS}
    if "/" in spec.image:
        values["DREAMBOOTH_IMAGE"] = spec.image
    if missing := [key for key, value in values.items() if not value]:
        raise UserError(f"{' and '.join(missing)} must be set: type "
                        + " ".join(f"{key}={SETTINGS[key]}" for key in missing) + " before the command")
    role, s3, image = values.values()
    spec = replace(spec, image=image)
    tuning = build_tuning_request(spec, role, s3, name) if kind == TUNER else {}
    requests_of_jobs = [_to_job(tuning)] if tuning else [request for _, request in requests.training_requests(spec)]
    if problems := [problem for request in requests_of_jobs for problem in _find_credentials(spec, request)]:
        raise ConfigError(*dict.fromkeys(problems))
    if kind == TUNER:
        return _submit_tuning_job(tuning)
    return _submit_pipeline(sagemaker_pipeline.render_pipeline(spec), name or sagemaker_pipeline.NAME, role, s3)


def _submit_tuning_job(request: dict[str, Any]) -> str:
    client = folders.client("sagemaker")
    shape = client.meta.service_model.operation_model("CreateHyperParameterTuningJob").input_shape
    if problems := list(request_validation.find_problems(request, shape)):
        raise ConfigError(*problems)
    name = request["HyperParameterTuningJobName"]
    _call("sagemaker:CreateHyperParameterTuningJob", name, lambda: client.create_hyper_parameter_tuning_job(**request))
    return f"tuning job {name}, at most {_count(request)} jobs: aws sagemaker stop-hyper-parameter-tuning-job " \
           f"--hyper-parameter-tuning-job-name {name} stops it"


def _count(request: Mapping[str, Any]) -> int:
    return int(request["HyperParameterTuningJobConfig"]["ResourceLimits"]["MaxNumberOfTrainingJobs"])


def _submit_pipeline(definition: str, name: str, role: str, s3: str) -> str:
    client = folders.client("sagemaker")
    pipeline = {"PipelineName": name, "PipelineDefinition": definition, "RoleArn": role,
                "ParallelismConfiguration": {"MaxParallelExecutionSteps": PARALLEL_STEPS}}
    try:
        client.describe_pipeline(PipelineName=name)
    except Exception as error:
        if aws_errors.error_code(error) != "ResourceNotFound":
            raise _translate(error, "sagemaker:DescribePipeline", name) from error
        _call("sagemaker:CreatePipeline", name, lambda: client.create_pipeline(**pipeline))
    else:
        _call("sagemaker:UpdatePipeline", name, lambda: client.update_pipeline(**pipeline))
    parameters = [{"Name": key, "Value": value} for key, value in ((requests.ROLE, role), (requests.S3, s3))]
    started = _call("sagemaker:StartPipelineExecution", name, lambda: client.start_pipeline_execution(
        PipelineName=name, PipelineParameters=parameters))
    arn = started["PipelineExecutionArn"]
    return f"pipeline {name}, execution {arn}: aws sagemaker stop-pipeline-execution --pipeline-execution-arn {arn} " \
           "stops it"


def _call(permission: str, where: str, call: Callable[[], T]) -> T:
    """Call the service, and translate an error of AWS to a sentence."""
    try:
        return call()
    except Exception as error:
        raise _translate(error, permission, where) from error


def _translate(error: Exception, permission: str, where: str) -> Exception:
    if aws_errors.error_code(error) == "ResourceInUse":
        return UserError(f"SageMaker has a tuning job {where} already, of an earlier command, or of this one if an "
                         "answer was lost: look at it with aws sagemaker describe-hyper-parameter-tuning-job "
                         f"--hyper-parameter-tuning-job-name {where}, or type --name NAME to start another one")
    if permission == "sagemaker:StartPipelineExecution" and aws_errors.may_have_been_received(error):
        return UserError(f"AWS did not answer, and the pipeline {where} may have started: look with aws sagemaker "
                         f"list-pipeline-executions --pipeline-name {where}, and repeat the command if it has not")
    return UserError(aws_errors.describe_error(error, permission, where)) \
        if aws_errors.is_aws_error(error) else error


def _to_job(tuning: Mapping[str, Any]) -> dict[str, Any]:
    definition = tuning["TrainingJobDefinition"]
    return {**definition, "HyperParameters": definition["StaticHyperParameters"], "Tags": tuning["Tags"]}


def _find_credentials(spec: SageMakerSpec, request: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence for each value of a request that looks like a credential.

    Values that are parameters of the pipeline are in `spec`.
    """
    values = {key: value for key, value in spec.settings.items() if value}
    return secrets.find_credentials({**request, "HyperParameters": {**request["HyperParameters"], **values}})
