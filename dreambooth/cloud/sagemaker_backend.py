"""Jobs on SageMaker, by boto3's own client: create, describe, stop."""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from dreambooth.cloud import request_validation
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Busy, Job, LoggedOut, Seen, Unreachable
from dreambooth.cloud.training_job_request import trained
from dreambooth.errors import UserError
from dreambooth.storage import aws_errors, folders

STATUS = {"InProgress": RUNNING, "Stopping": RUNNING, "Deleting": STOPPED, "Completed": COMPLETED, "Failed": FAILED,
          "Stopped": STOPPED}
NIGHT = 12 * 3600.0  # seconds that a person has for a new login
THERE = ("ResourceInUse", "ResourceInUseException")  # and a ValidationException that says the name is taken


class TrainingJobs:
    """A Backend."""

    def __init__(self, client: Any | None = None) -> None:
        self._client, self._given = client or folders.client("sagemaker"), client is not None
        self._answered = False

    def problems(self, request: dict[str, Any]) -> list[str]:
        """What the service would refuse."""
        shape = self._client.meta.service_model.operation_model("CreateTrainingJob").input_shape
        return list(request_validation.problems(request, shape))

    def submit(self, job: Job) -> Seen:
        try:
            self._client.create_training_job(**job.request)
        except Exception as error:
            if self._taken(error):
                return self._same(job)
            if aws_errors.code(error) == "ResourceLimitExceeded":
                raise Busy(f"the account may not have more of {job.request['ResourceConfig']['InstanceType']} now: ask "
                           "for more in Service Quotas, 'for training job usage'") from error
            raise self._said(error, "sagemaker:CreateTrainingJob", job.name) from error
        self._answered = True
        return Seen(RUNNING, "Starting")

    def look(self, job: Job) -> Seen:
        told = self._describe(job)
        metrics = {item["MetricName"]: item["Value"] for item in told.get("FinalMetricDataList", ())}
        seen = Seen(
            STATUS.get(told["TrainingJobStatus"], RUNNING), told.get("SecondaryStatus", ""),
            step=int(metrics["step"]) if "step" in metrics else None, loss=metrics.get("loss"), seconds=_seconds(told),
            billed=told.get("BillableTimeInSeconds"), reason=told.get("FailureReason", ""))
        if seen.status == COMPLETED:
            seen.result = self._result(told, job)
        if seen.status == STOPPED and not seen.reason:
            seen.reason = f"it was stopped ({seen.detail})"
        if not seen.ended:
            seen.billed = None
        return seen

    def stop(self, job: Job) -> bool:
        try:
            self._client.stop_training_job(TrainingJobName=job.name)
        except Exception as error:
            if aws_errors.code(error) == "ValidationException":  # it has ended meanwhile, or never began
                return False
            raise self._said(error, "sagemaker:StopTrainingJob", job.name) from error
        return True

    def stop_hint(self, job: Job) -> str:
        return f"aws sagemaker stop-training-job --training-job-name {job.name}"

    def ended_badly(self, name: str) -> bool:
        """Whether there is a job of that name which failed or was stopped."""
        try:
            told = self._client.describe_training_job(TrainingJobName=name)
        except Exception as error:
            if aws_errors.code(error) in ("ValidationException", "ResourceNotFound"):
                return False
            raise UserError(aws_errors.sentence(error, "sagemaker:DescribeTrainingJob", name)) from error
        return told["TrainingJobStatus"] in ("Failed", "Stopped")

    def _describe(self, job: Job) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._client.describe_training_job(TrainingJobName=job.name)
        except Exception as error:
            raise self._said(error, "sagemaker:DescribeTrainingJob", job.name) from error
        self._answered = True
        return found

    def _taken(self, error: Exception) -> bool:
        return aws_errors.code(error) in THERE or (
            aws_errors.code(error) == "ValidationException" and "already" in str(error).lower())

    def _same(self, job: Job) -> Seen:
        """The job of that name, if it is this one: begun by an earlier command, or by a call whose answer was lost."""
        theirs, ours = (trained(of.get("HyperParameters", {})) for of in (self._describe(job), job.request))
        if differing := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
            raise UserError(f"there is another job {job.name} already, with another {', another '.join(differing)}: "
                            "type another hydra.launcher.sweep=NAME")
        return self.look(job)

    def _result(self, told: dict[str, Any], job: Job) -> dict[str, Any]:
        """What the job left. It is paid for: it has failed only if its result is not there, or is none."""
        path = f"{told['ModelArtifacts']['S3ModelArtifacts'].rstrip('/')}/result.json"
        try:
            return folders.read_json(path)
        except (UserError, ValueError) as error:
            why = error.__cause__
            if why is not None and (aws_errors.passing(why) or aws_errors.logged_out(why)):
                raise self._said(why, "s3:GetObject", path) from error
            return {"problem": f"{path} cannot be read ({error})"}

    def _said(self, error: BaseException, doing: str, where: str) -> BaseException:
        if aws_errors.logged_out(error):
            self._renew()
            wait = NIGHT if self._answered and aws_errors.renewable() else 0.0
            return LoggedOut(aws_errors.sentence(error, doing, where), wait)
        if aws_errors.passing(error):
            return Unreachable(f"AWS does not answer ({aws_errors.code(error)})")
        if aws_errors.known(error):
            return UserError(aws_errors.sentence(error, doing, where))
        return error

    def _renew(self) -> None:
        """A client reads its credentials once; another one finds those of a new login."""
        if not self._given:
            with suppress(UserError):
                self._client = folders.client("sagemaker")


def _seconds(told: dict[str, Any]) -> float:
    """Of training so far: SageMaker's own number once there is one."""
    if "TrainingTimeInSeconds" in told:
        return float(told["TrainingTimeInSeconds"])
    start = told.get("TrainingStartTime")
    return max(0.0, (datetime.now(UTC) - start).total_seconds()) if start else 0.0
