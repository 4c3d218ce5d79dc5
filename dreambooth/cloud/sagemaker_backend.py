"""Backend that creates, polls and stops SageMaker training jobs.

Requests are checked by the typed shapes of the SageMaker SDK, and jobs are polled and stopped by its TrainingJob. Jobs
are created by the boto3 client, because TrainingJob.create would describe the new job and raise the errors of that
second call as if the job had not been created: a job that runs and costs money would be reported as failed.
"""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from dreambooth.cloud import request_validation, sagemaker_sdk
from dreambooth.cloud.job import (
    COMPLETED,
    FAILED,
    RUNNING,
    STOPPED,
    Job,
    JobState,
    LoginRequired,
    QuotaExceeded,
    Unreachable,
)
from dreambooth.cloud.training_job_request import identifying_hyperparameters
from dreambooth.errors import UserError
from dreambooth.storage import aws_errors, folders

STATUS = {"InProgress": RUNNING, "Stopping": RUNNING, "Deleting": STOPPED, "Completed": COMPLETED, "Failed": FAILED,
          "Stopped": STOPPED}
LOGIN_PATIENCE = 12 * 3600.0  # seconds to wait for the user to log in again, long enough for a night
NAME_TAKEN_CODES = ("ResourceInUse", "ResourceInUseException")  # ValidationException can mean the same


class SageMakerBackend:
    """A Backend that runs SageMaker training jobs.

    Args:
        client: boto3's SageMaker client; None: create a client, and create another one when its credentials expire.
    """

    def __init__(self, client: Any | None = None) -> None:
        self._client, self._is_own_client = client or folders.client("sagemaker"), client is None
        self._has_answered = False
        sagemaker_sdk.mute_logs()

    def find_problems(self, request: dict[str, Any]) -> list[str]:
        """Return the reasons why SageMaker would reject a request, one sentence per reason."""
        return sagemaker_sdk.find_type_problems(request, self.request_shape) or list(
            request_validation.find_problems(request, self.request_shape))

    @property
    def request_shape(self) -> Any:
        """botocore's shape of a CreateTrainingJob request."""
        return self._client.meta.service_model.operation_model("CreateTrainingJob").input_shape

    def submit(self, job: Job) -> JobState:
        try:
            self._client.create_training_job(**job.request)
        except Exception as error:
            if _is_name_taken(error):
                return self._poll_existing(job)
            if aws_errors.error_code(error) == "ResourceLimitExceeded":
                raise QuotaExceeded(f"the account's quota for {job.instance_type} is used up: request an increase in "
                                    "Service Quotas, 'for training job usage'") from error
            raise self._translate(error, "sagemaker:CreateTrainingJob", job.name) from error
        self._has_answered = True
        return JobState(RUNNING, "Starting")

    def poll(self, job: Job) -> JobState:
        training_job = self._describe(job.name)
        metrics = {item.metric_name: item.value for item in training_job.final_metric_data_list or ()}
        state = JobState(
            STATUS.get(training_job.training_job_status, RUNNING), training_job.secondary_status or "",
            step=int(metrics["step"]) if "step" in metrics else None, loss=metrics.get("loss"),
            seconds=_training_seconds(training_job), billed_seconds=_number(training_job.billable_time_in_seconds),
            reason=training_job.failure_reason or "",
            reported=(int(metrics["reported_step"]), metrics["reported_value"])
            if {"reported_step", "reported_value"} <= metrics.keys() else None)
        if state.status == COMPLETED:
            state.result = self._read_result(training_job, job)
        if state.status == STOPPED and not state.reason:
            state.reason = f"it was stopped ({state.detail})"
        if not state.ended:
            state.billed_seconds = None
        return state

    def stop(self, job: Job) -> bool:
        try:
            sagemaker_sdk.bind_training_job(job.name, self._client).stop()
        except Exception as error:
            if aws_errors.error_code(error) == "ValidationException":  # the job has ended or was never created
                return False
            raise self._translate(error, "sagemaker:StopTrainingJob", job.name) from error
        return True

    def stop_command(self, job: Job) -> str:
        return f"aws sagemaker stop-training-job --training-job-name {job.name}"

    def has_failed(self, name: str) -> bool:
        """Return whether a job with this name exists and has failed or been stopped."""
        try:
            training_job = sagemaker_sdk.describe_training_job(name, self._client)
        except UserError:
            raise
        except Exception as error:
            if aws_errors.error_code(error) in ("ValidationException", "ResourceNotFound"):
                return False
            raise UserError(aws_errors.describe_error(error, "sagemaker:DescribeTrainingJob", name)) from error
        return training_job.training_job_status in ("Failed", "Stopped")

    def _describe(self, name: str) -> Any:
        """Return the SDK's TrainingJob object with the current description of a job."""
        try:
            training_job = sagemaker_sdk.describe_training_job(name, self._client)
        except UserError:
            raise
        except Exception as error:
            raise self._translate(error, "sagemaker:DescribeTrainingJob", name) from error
        self._has_answered = True
        return training_job

    def _poll_existing(self, job: Job) -> JobState:
        """Return the state of the existing SageMaker job that has the name of `job`.

        The existing job was created by an earlier command, or by an earlier call whose response was lost.

        Raises:
            UserError: the hyperparameters of the existing job are those of a different run.
        """
        existing, own = (identifying_hyperparameters(hyperparameters or {}) for hyperparameters in (
            self._describe(job.name).hyper_parameters, job.request.get("HyperParameters")))
        differing = sorted(key for key in existing.keys() | own.keys() if existing.get(key) != own.get(key))
        if differing:
            raise UserError(f"a job {job.name} exists already and differs in {', '.join(differing)}: type another "
                            "hydra.launcher.sweep=NAME")
        return self.poll(job)

    def _read_result(self, training_job: Any, job: Job) -> dict[str, Any]:
        """Return the content of result.json in a job's output.

        If the file is missing or invalid, return {"problem": reason}. If it may not be read, such as for a missing
        permission, {"problem": reason, "unread": True}: a repeated command reads it again.

        If the network or the login fails, raise an exception. The next poll then reads the file again, so that the
        result of a paid job is not lost.

        Args:
            training_job: the SDK's TrainingJob object of `job`.
        """
        path = f"{training_job.model_artifacts.s3_model_artifacts.rstrip('/')}/result.json"
        try:
            return folders.read_json(path)
        except (UserError, ValueError) as error:
            cause = error.__cause__
            if cause is not None and (aws_errors.is_transient(cause) or aws_errors.needs_login(cause)):
                raise self._translate(cause, "s3:GetObject", path) from error
            unread = cause is not None and aws_errors.is_aws_error(cause) and not aws_errors.is_missing(cause)
            return {"problem": f"{path} cannot be read ({error})"} | ({"unread": True} if unread else {})

    def _translate(self, error: BaseException, permission: str, resource: str) -> BaseException:
        """Return the exception of the Backend protocol that corresponds to an AWS error. Return other errors unchanged.

        Args:
            permission: the IAM action of the failed call, such as sagemaker:CreateTrainingJob.
            resource: the name of the job or S3 object that the failed call accessed.
        """
        if aws_errors.needs_login(error):
            self._renew_client()
            patience = LOGIN_PATIENCE if self._has_answered and aws_errors.login_can_be_renewed() else 0.0
            return LoginRequired(aws_errors.describe_error(error, permission, resource), patience)
        if aws_errors.is_transient(error):
            return Unreachable(f"AWS does not answer ({aws_errors.error_code(error)})")
        if aws_errors.is_aws_error(error):
            return UserError(aws_errors.describe_error(error, permission, resource))
        return error

    def _renew_client(self) -> None:
        """Replace the client by a new one.

        A boto3 client reads credentials only once, and would not use the credentials of a new login.
        """
        if self._is_own_client:
            with suppress(UserError):
                self._client = folders.client("sagemaker")


def _is_name_taken(error: Exception) -> bool:
    code = aws_errors.error_code(error)
    return code in NAME_TAKEN_CODES or (code == "ValidationException" and "already" in str(error).lower())


def _training_seconds(training_job: Any) -> float:
    """Return how long a job has trained, in seconds.

    If the description contains SageMaker's own value, return this value. Otherwise return the time since training
    began, or 0 if training has not begun.

    Args:
        training_job: the SDK's TrainingJob object of the job.
    """
    seconds = _number(training_job.training_time_in_seconds)
    if seconds is not None:
        return float(seconds)
    start = training_job.training_start_time
    return max(0.0, (datetime.now(UTC) - start).total_seconds()) if start else 0.0


def _number(value: Any) -> float | None:
    """Return a number of a description; None in place of the SDK's object Unassigned, which is false as 0 is."""
    return value if isinstance(value, int | float) else None
