"""The SageMaker SDK: what the launcher uses of it, and which of its calls do harm and are therefore not used."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError
from botocore.stub import Stubber

from dreambooth.cloud import sagemaker_sdk
from dreambooth.cloud.job import Job
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.errors import UserError
from dreambooth.storage import folders
from tests.cloud.jobs import GOLDEN, PHOTOS, config_of, jobs_of
from tests.support.faults import FAST
from tests.support.s3_server import KEYS
from tests.support.warm_python import PYTHON

pytestmark = pytest.mark.usefixtures("environment")
GOOD = json.loads((GOLDEN / "sagemaker-g5-on-demand.json").read_text())


@cache
def client() -> Any:
    """One client for all tests that only stub it, because creating one takes long."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in KEYS.items():
            patch.setenv(key, value)
        return folders.client("sagemaker")


@pytest.fixture
def stub() -> Iterator[Stubber]:
    with Stubber(client()) as found:
        yield found
        found.assert_no_pending_responses()


def shape() -> Any:
    return client().meta.service_model.operation_model("CreateTrainingJob").input_shape


def described(job: Job, **more: Any) -> dict[str, Any]:
    return {"TrainingJobName": job.name, "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/x",
            "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/model"}, "TrainingJobStatus": "InProgress",
            "SecondaryStatus": "Training", "AlgorithmSpecification": job.request["AlgorithmSpecification"],
            "ResourceConfig": job.request["ResourceConfig"], "StoppingCondition": job.request["StoppingCondition"],
            "CreationTime": 1764400000} | more


# -- the typed request ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["g4dn-spot", "g5-on-demand", "multi-gpu"])
def test_the_sdks_shapes_hold_a_golden_request_without_loss(name: str) -> None:
    from sagemaker.core.utils.utils import serialize

    request = json.loads((GOLDEN / f"sagemaker-{name}.json").read_text())
    assert serialize(sagemaker_sdk.typed_request(request, shape())) == request


@pytest.mark.parametrize("change, problem", [
    ({"EnableManagedSpotTraining": "yes"}, "EnableManagedSpotTraining must be true or false"),
    ({"ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": "1", "VolumeSizeInGB": 30}},
     "ResourceConfig.InstanceCount must be an integer"),
    ({"StoppingCondition": {"MaxRuntimeInSeconds": 1.5}}, "StoppingCondition.MaxRuntimeInSeconds must be an integer"),
    ({"VpcConfig": "subnet-1"}, "VpcConfig must be a mapping"),
    ({"VpcConfig": {"Subnets": ["subnet-1"]}}, "VpcConfig.SecurityGroupIds is missing"),
    ({"HyperParameters": ["a"]}, "HyperParameters must be a mapping"),
    ({"InputDataConfig": {"a": "b"}}, "InputDataConfig must be a list"),
    ({"Tags": [{"Key": "a", "Value": 17}]}, "Tags[0].Value must be a string"),
    ({"Environment": {"str": 17}}, "Environment.str must be a string"),
    ({"OutputDataConfig": {"S3OutputPath": "s3://b/p", "Nonsense": 1}}, "OutputDataConfig.Nonsense is not known to"),
])
def test_a_value_of_the_wrong_type_is_refused_before_it_is_sent(change: dict[str, Any], problem: str) -> None:
    [found] = SageMakerBackend(client()).find_problems(GOOD | change)
    assert found.startswith(problem)


# -- jobs through TrainingJob -----------------------------------------------------------------------------------------

@pytest.fixture
def job() -> Job:
    [found] = jobs_of(config_of("hardware=g4dn", *PHOTOS), client=client())
    return found


def answering(client: Any, **answers: dict[str, Any]) -> list[str]:
    """Let a client answer its requests itself, below the code that logs them. Return the names of its requests."""
    sent: list[str] = []

    class Raw:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def stream(self, **_: Any) -> Iterator[bytes]:
            yield self.content

    def answer(request: Any, **_: Any) -> AWSResponse:
        operation = request.headers["X-Amz-Target"].decode().partition(".")[2]
        sent.append(operation)
        return AWSResponse(request.url, 200, {}, Raw(json.dumps(answers.get(operation, {})).encode()))

    client.meta.events.register("before-send.sagemaker", answer)
    return sent


def test_a_job_that_costs_nothing_is_billed_nothing(job: Job) -> None:
    """The SDK's object for a value that is missing is false, as 0 is."""
    own = folders.client("sagemaker")
    answering(own, DescribeTrainingJob=described(
        job, TrainingJobStatus="Stopped", BillableTimeInSeconds=0, TrainingTimeInSeconds=0, TrainingStartTime=0))
    state = SageMakerBackend(own).poll(job)
    assert (state.billed_seconds, state.seconds) == (0, 0.0)


def test_a_description_that_the_sdk_does_not_understand_is_one_sentence(job: Job) -> None:
    own = folders.client("sagemaker")
    answering(own, DescribeTrainingJob=described(
        job, VpcConfig={"SecurityGroupIds": ["sg-1"]}, Environment={"NOTE": "HIDDEN"}))
    backend = SageMakerBackend(own)
    for ask in (lambda: backend.poll(job), lambda: backend.has_failed(job.name)):
        with pytest.raises(UserError, match=f"not understand AWS's description of {job.name}: type pip") as found:
            ask()
        assert "sg-1" not in str(found.value) and "HIDDEN" not in str(found.value)


def test_nothing_secret_is_logged_at_the_level_debug(
        job: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """hydra.verbose=true lets every logger of the process log at this level."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "HIDDEN-TOKEN")
    for name in ("botocore", *sagemaker_sdk.LOGGERS):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    client = folders.client("sagemaker")
    job.request["Environment"]["NOTE"] = "HIDDEN-VALUE"
    sent = answering(client, DescribeTrainingJob=described(job, Environment=job.request["Environment"]))
    backend = SageMakerBackend(client)
    assert backend.find_problems(job.request) == []
    backend.submit(job)
    assert backend.poll(job).detail == "Training"
    assert backend.stop(job)
    assert not backend.has_failed(job.name)
    assert sent == ["CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob", "DescribeTrainingJob"]
    assert "HIDDEN" not in caplog.text
    assert not [record for record in caplog.records if record.name.startswith("sagemaker")], "it prints nothing else"


# -- what the SDK's own calls would do --------------------------------------------------------------------------------

def create(client: Any, request: dict[str, Any]) -> Any:
    """Create a job as the SDK does."""
    arguments = dict(sagemaker_sdk.typed_request(request, shape()))
    return sagemaker_sdk.load_resources().TrainingJob.create(
        **{key: value for key, value in arguments.items() if value}, session=sagemaker_sdk._session_of(client),
        region="us-east-1")


def test_the_sdks_create_reports_a_job_that_runs_as_one_that_does_not(stub: Stubber, job: Job) -> None:
    stub.add_response("create_training_job", {"TrainingJobArn": described(job)["TrainingJobArn"]}, job.request)
    stub.add_client_error("describe_training_job", "AccessDeniedException", "no", 403)
    with pytest.raises(ClientError, match="DescribeTrainingJob"):
        create(stub.client, job.request)
    stub.add_response("create_training_job", {"TrainingJobArn": described(job)["TrainingJobArn"]}, job.request)
    assert SageMakerBackend(stub.client).submit(job).status == "InProgress"


def test_the_sdks_create_and_get_log_the_environment_of_a_job(
        stub: Stubber, job: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("sagemaker"), "level", logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    job.request["Environment"]["NOTE"] = "HIDDEN-SENT"
    stub.add_response("create_training_job", {"TrainingJobArn": described(job)["TrainingJobArn"]})
    stub.add_response("describe_training_job", described(job, Environment={"NOTE": "HIDDEN-DESCRIBED"}))
    create(stub.client, job.request)
    assert "HIDDEN-SENT" in caplog.text and "HIDDEN-DESCRIBED" in caplog.text


def test_the_sdks_create_ignores_the_defaults_files(
        stub: Stubber, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both a valid file and one that cannot be read."""
    valid = tmp_path / "valid.yaml"
    vpc = "{Subnets: [s], SecurityGroupIds: [g]}"
    valid.write_text(f"SchemaVersion: '1.0'\nSageMaker: {{TrainingJob: {{VpcConfig: {vpc}}}}}")
    for path in (valid, tmp_path / "missing.yaml"):
        monkeypatch.setenv("SAGEMAKER_ADMIN_CONFIG_OVERRIDE", str(path))
        stub.add_response("create_training_job", {"TrainingJobArn": described(job)["TrainingJobArn"]}, job.request)
        stub.add_response("describe_training_job", described(job))
        create(stub.client, job.request)


def test_the_sdks_list_describes_each_job(stub: Stubber, job: Job) -> None:
    summary = {"TrainingJobName": job.name, "TrainingJobArn": described(job)["TrainingJobArn"],
               "CreationTime": 1764400000, "TrainingJobStatus": "InProgress"}
    stub.add_response("list_training_jobs", {"TrainingJobSummaries": [summary]})
    stub.add_response("describe_training_job", described(job), {"TrainingJobName": job.name})
    listed = sagemaker_sdk.load_resources().TrainingJob.get_all(
        session=sagemaker_sdk._session_of(stub.client), region="us-east-1")
    assert [item.training_job_name for item in listed] == [job.name]


def test_the_sdks_own_client_repeats_a_call_ten_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from boto3.session import Session
    from sagemaker.core.utils.utils import SageMakerClient

    configs: dict[str, Any] = {}
    monkeypatch.setattr(Session, "client", lambda self, name, region, config: configs.update({name: config}))
    SageMakerClient(session=Session(region_name="us-east-1"), region_name="us-east-1")
    assert (len(configs), configs["sagemaker"].retries) == (4, {"max_attempts": 10, "mode": "standard"})
    monkeypatch.undo()
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = folders.client("sagemaker")
    jobs = [sagemaker_sdk.bind_training_job(name, client) for name in "xy"]
    assert jobs[0]._get_client() is client
    assert jobs[0]._session is jobs[1]._session, "the SDK keeps every session, with clients, until the process ends"
    assert client.meta.config.retries["total_max_attempts"] == 3


# -- telemetry --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, choice", [
    ({}, True), ({"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"Session": {}}}}}, True),
    ({"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": False}}}}, False)])
def test_telemetry_is_off_unless_the_user_has_said_otherwise(
        settings: dict[str, Any], choice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagemaker.core.common_utils import resolve_value_from_config
    from sagemaker.core.config.config import validate_sagemaker_config
    from sagemaker.core.config.config_schema import TELEMETRY_OPT_OUT_PATH
    from sagemaker.core.helper import session_helper

    monkeypatch.setattr(session_helper, "Session", SimpleNamespace)  # a real one takes a second
    before = json.dumps(settings)
    session = sagemaker_sdk.open_session(settings)
    validate_sagemaker_config(session.sagemaker_config)
    assert resolve_value_from_config(
        config_path=TELEMETRY_OPT_OUT_PATH, default_value=False, sagemaker_session=session) is choice
    assert json.dumps(settings) == before


# -- who imports it ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [
    ["dreambooth.train", "--cfg", "job"],
    pytest.param(["dreambooth.plan", "model=tiny", "hardware=cpu"], marks=pytest.mark.slow),
    pytest.param(["dreambooth.train", "-m", "hydra/launcher=sagemaker", "hydra.launcher.mode=local", *FAST,
                  "train.max_train_steps=1", "sample.every=null", "prior.with_prior_preservation=false"],
                 marks=pytest.mark.slow)])
def test_commands_that_submit_nothing_do_not_import_the_sdk(words: list[str], tmp_path: Path) -> None:
    code = ("import atexit, runpy, sys\n"
            "atexit.register(lambda: print('imported:', {'sagemaker'} & set(sys.modules)))\n"
            f"sys.argv = {[*words, f'run_root={tmp_path}']}\n"
            "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)")
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["imported: set()"]), done.stdout + done.stderr


def test_without_the_sdk_the_error_says_what_to_install(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sagemaker.core", None)
    with pytest.raises(UserError, match=r"SageMaker needs a package: pip install 'dreambooth\[aws\]'"):
        SageMakerBackend(client()).poll(job)
