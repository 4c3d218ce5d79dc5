"""The SageMaker Pipeline and the tuning job of a sweep: equal to the committed files, valid, executed in local mode."""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import botocore.session
import jsonschema
import pytest
from botocore.stub import Stubber

from dreambooth import entrypoint, workflows
from dreambooth.cloud import pipeline_requests, request_validation, sagemaker_pipeline, sagemaker_submit
from dreambooth.cloud.sagemaker_tuner import build_tuning_request
from dreambooth.config.compose import SearchSpace
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.errors import ConfigError, UserError
from dreambooth.storage import folders
from dreambooth.sweeps import job_results
from tests.cloud.jobs import IMAGE, ROLE, ROOT
from tests.support import workflow_schemas as schemas

Json = dict[str, Any]
FILES = ROOT / "workflows/sagemaker"
EXAMPLES = {"Parameters.RoleArn": ROLE, "Parameters.S3Folder": "s3://bucket/sweeps",
            "Execution.PipelineExecutionId": "2drr2511ngo3"}
SETTINGS = {"hardware": "cpu", "train.max_train_steps": "2", "prior.prior_loss_weight": "0.5"}
CPU = ["hardware=cpu", "precision=fp32", "model=tiny", "memory=fast"]
NO_INSTANCE_TYPE = "hardware=cpu has no SageMaker instance type: type hardware.instance_type=ml.m5.2xlarge"
LOCAL = [f"{key}={value}" for key, value in SETTINGS.items()]


@cache
def spec(*overrides: str, space: str = "tiny", base: tuple[str, ...] = workflows.DEFAULT_OVERRIDES,
         ) -> pipeline_requests.SageMakerSpec:
    return workflows.to_sagemaker(workflows.build_spec((*base, *overrides), space))


def problems(request: Json, operation: str) -> list[str]:
    shape = botocore.session.get_session().get_service_model("sagemaker").operation_model(operation).input_shape
    return list(request_validation.find_problems(request, shape))


# -- the tuning job ------------------------------------------------------------------------------------------------

def test_the_tuning_job_is_the_committed_file_and_valid() -> None:
    request = build_tuning_request(spec(space="subject"))
    assert json.loads((FILES / "tuning-job.json").read_text("utf-8")) == request
    assert problems(request, "CreateHyperParameterTuningJob") == []
    assert problems({**request, "TrainingJobDefinition": {}}, "CreateHyperParameterTuningJob") != []
    definition = request["TrainingJobDefinition"]
    assert "CheckpointConfig" not in definition  # all jobs would share it
    names = [metric["Name"] for metric in definition["AlgorithmSpecification"]["MetricDefinitions"]]
    assert request["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"] == {
        "Type": "Minimize", "MetricName": names[-1]}


def test_numbers_become_ranges_with_their_scaling_and_other_values_categories() -> None:
    values = {"a.lr": ("1e-4", "5e-6", "2e-05"), "a.rank": ("16", "4", "64"), "a.weight": ("0.5", "1"),
              "a.flag": ("true", "false"), "a.text": ("x", "2"), "a.one": ("7",),
              "a.same": ("1e-4", "0.0001"), "a.steps": ("1_000", "200"), "a.infinite": ("inf", "1")}
    given = spec()
    request = build_tuning_request(pipeline_requests.SageMakerSpec(
        given.overrides, SearchSpace("mine", values, frozenset({"a.lr", "a.rank"})), given.hardware, "image"))
    ranges = request["HyperParameterTuningJobConfig"]["ParameterRanges"]
    assert {kind: [tuple(item.values()) for item in items] for kind, items in ranges.items()} == {
        "IntegerParameterRanges": [("a.rank", "4", "64", "Logarithmic"), ("a.steps", "200", "1000", "Linear")],
        "ContinuousParameterRanges": [("a.lr", "5e-6", "1e-4", "Logarithmic"), ("a.weight", "0.5", "1", "Linear")],
        "CategoricalParameterRanges": [("a.flag", ["true", "false"]), ("a.text", ["x", "2"]),
                                       ("a.infinite", ["inf", "1"])]}
    static = request["TrainingJobDefinition"]["StaticHyperParameters"]
    assert (static["a.one"], static["a.same"]) == ("7", "1e-4")


def test_a_search_space_marks_the_keys_with_a_logarithmic_scale() -> None:
    assert workflows.search_space("lora").logarithmic == {"method.rank", "train.learning_rate"}


@pytest.mark.parametrize("overrides, message", [
    (CPU, NO_INSTANCE_TYPE),
    ([*LOCAL[1:], "train.learning_rate=1e-4", "train.train_text_encoder=true"],
     "sweep=tiny has nothing left to search"),
])
def test_what_cannot_be_tuned_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tuning_request(spec(*overrides))


def test_the_container_takes_hyperparameters_as_the_tuner_sends_them(tmp_path: Path) -> None:
    """SageMaker writes numbers in Java's notation. The tuner of the SDK encodes texts as JSON."""
    fixed = build_tuning_request(spec())["TrainingJobDefinition"]["StaticHyperParameters"]
    sent = {key: json.dumps(value) for key, value in fixed.items()} | {
        "_tuning_objective_metric": "objective", "train.learning_rate": "2.3456789012345E-4",
        "train.max_train_steps": "131", "train.train_text_encoder": '"true"', "hardware": '"cpu"'}
    args, run = compose(tmp_path, sent)
    assert (run.train.learning_rate, run.train.max_train_steps) == (2.3456789012345e-4, 131)
    assert (run.train.train_text_encoder, run.tracking.sweep) == (True, "sagemaker-tiny")
    assert not any("_tuning" in arg for arg in args)


def compose(folder: Path, hyperparameters: dict[str, str]) -> tuple[list[str], Any]:
    """The overrides and the configuration of a job, as the container reads them."""
    config = folder / "input/config/hyperparameters.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps(hyperparameters), "utf-8")
    paths = SageMakerPaths(folder)
    args = entrypoint.read_request(paths, [], None).to_args()
    return args, entrypoint.compose_run(args, paths)[0]


# -- the pipeline --------------------------------------------------------------------------------------------------

def evaluated(value: Any, definition: Json) -> Any:
    """A part of a definition in which examples replace parameters, joins and properties."""
    if isinstance(value, list):
        return [evaluated(item, definition) for item in value]
    if not isinstance(value, dict):
        return value
    if "Get" in value:
        defaults = {f"Parameters.{one['Name']}": one.get("DefaultValue") for one in definition["Parameters"]}
        return (defaults | EXAMPLES)[value["Get"]]
    if "Std:Join" in value:
        return value["Std:Join"]["On"].join(evaluated(value["Std:Join"]["Values"], definition))
    if "Std:JsonGet" in value:
        assert value["Std:JsonGet"]["PropertyFile"] == {"Get": "Steps.choose.PropertyFiles.Best"}
        return "s3://bucket/model/"
    return {key: evaluated(item, definition) for key, item in value.items()}


def test_the_pipeline_is_the_committed_file_and_valid() -> None:
    text = sagemaker_pipeline.render_pipeline(spec(space="subject"))
    assert text == (FILES / "pipeline.json").read_text("utf-8")
    definition = json.loads(text)
    jsonschema.validate(definition, schemas.sagemaker_envelope())
    steps = {step["Name"]: step for step in definition["Steps"]}
    trials = [name for name in steps if name.startswith("train-")]
    assert list(steps) == ["validate", *trials, "choose", "register"]
    assert len(trials) == len(spec(space="subject").space.trials())
    assert [entry["Step"] for entry in steps["choose"]["DependsOn"]] == trials
    operations = {"Processing": ("CreateProcessingJob", {"ProcessingJobName": "a"}),
                  "Training": ("CreateTrainingJob", {"TrainingJobName": "a"}),
                  "RegisterModel": ("CreateModelPackage", {})}
    for step in steps.values():
        operation, name = operations[step["Type"]]
        arguments = evaluated(step["Arguments"], definition) | name
        arguments.pop("CustomerMetadataProperties", None)  # botocore's pattern for its values is malformed
        assert problems(arguments, operation) == []
    places = [evaluated(steps[name]["Arguments"][part], definition)[key] for name in trials
              for part, key in (("OutputDataConfig", "S3OutputPath"), ("CheckpointConfig", "S3Uri"))]
    assert len(set(places)) == 2 * len(trials)


@pytest.mark.skipif(not (schemas.FOLDER and (schemas.FOLDER / schemas.PIPELINE_SCHEMA).is_file()),
                    reason=f"WORKFLOW_SCHEMAS has no {schemas.PIPELINE_SCHEMA}")
def test_the_published_schema_allows_the_pipeline() -> None:
    jsonschema.validate(json.loads((FILES / "pipeline.json").read_text("utf-8")), schemas.published_sagemaker_schema())


def test_overrides_are_parameters_and_photos_a_channel() -> None:
    given = spec("train.seed=7")
    assert pipeline_requests.parameters(given) | {"Image": ""} == {
        "Image": "", "RoleArn": None, "S3Folder": None, "InstanceType": "ml.g4dn.xlarge",
        "ProcessingInstanceType": "ml.m5.xlarge", "ModelPackageGroup": "dreambooth",
        "dataset-instance_dir": "s3://BUCKET/photos", "dataset-instance_prompt": "a photo of a zwx dog",
        "dataset-class_prompt": "a photo of a dog", "train-seed": "7"}
    request = dict(pipeline_requests.training_requests(given))["train-1"]
    [channel] = request["InputDataConfig"]
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "<<Parameters.dataset-instance_dir>>/"
    assert request["HyperParameters"]["train.seed"] == "<<Parameters.train-seed>>"
    assert "dataset" not in request["HyperParameters"]
    arguments = pipeline_requests.validate_request(given)["AppSpecification"]["ContainerArguments"]
    assert arguments[-2:] == ["dataset.class_prompt=<<Parameters.dataset-class_prompt>>",
                              "train.seed=<<Parameters.train-seed>>"]
    marked = replace(given, space=SearchSpace("mine", {"dataset.class_prompt": ("a <<zwx>> dog",)}))
    definition = json.loads(sagemaker_pipeline.render_pipeline(marked))
    [step] = [step for step in definition["Steps"] if step["Name"] == "train-1"]
    assert step["Arguments"]["HyperParameters"]["dataset.class_prompt"] == "a <<zwx>> dog", "not a reference"
    with pytest.raises(UserError, match="~method deletes a key, which hyperparameters cannot express"):
        pipeline_requests.SageMakerSpec(("~method",), given.space, given.hardware, "image")


@pytest.mark.slow
def test_local_mode_executes_the_pipeline_up_to_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK executes the pipeline. Instead of a container, a function does what the image does."""
    import boto3

    (tmp_path / "sdk.yaml").write_text(
        "SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n", "utf-8")
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(tmp_path / "sdk.yaml"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    given = spec(*LOCAL, base=())
    sagemaker_pipeline.build_pipeline(given)  # imports the SDK
    from sagemaker.core.local import local_session
    from sagemaker.mlops.local import LocalPipelineSession

    class Container:
        """What the SDK's local mode does with a container of the image."""

        container_entrypoint = container_arguments = None
        runs: ClassVar[list[Any]] = []

        def __init__(self, instance_type: str, instance_count: int, image: str, sagemaker_session: Any = None,
                     container_entrypoint: Any = None, container_arguments: Any = None) -> None:
            self.instance_type, self.instance_count, self.image = instance_type, instance_count, image
            self.container_entrypoint, self.container_arguments = container_entrypoint, container_arguments

        def train(self, inputs: Any, output: Json, hyperparameters: dict[str, str], environment: Any, job: str) -> str:
            _, run = compose(tmp_path / job, hyperparameters)
            self.runs.append(run)
            folder = Path(output["S3OutputPath"].removeprefix("file://"))
            write_archive(folder, objective=run.train.learning_rate)
            return f"{output['S3OutputPath']}/model.tar.gz"

        def process(self, inputs: Any, outputs: Any, environment: Any, job: str) -> None:
            assert self.container_entrypoint == ["python", "-m", "dreambooth.stage"]
            self.runs.append(self.container_arguments)
            if self.container_arguments[0] == "choose":
                assert self.container_arguments[-1] == inputs[0]["S3Input"]["LocalPath"]
                job_results.choose(inputs[0]["S3Input"]["S3Uri"].removeprefix("file://"), tmp_path)

    monkeypatch.setattr(local_session, "_SageMakerContainer", Container)
    session = LocalPipelineSession(boto_session=boto3.Session(region_name="us-east-1"))
    pipeline = sagemaker_pipeline.build_pipeline(given, session)
    session.create_pipeline(pipeline, "a sweep")
    execution = session.start_pipeline_execution(pipeline.name, PipelineParameters={
        "RoleArn": ROLE, "S3Folder": f"file://{tmp_path}/jobs", "InstanceType": "local",
        "ProcessingInstanceType": "local"})
    assert execution.status == "Succeeded", execution.failure_reason
    first, *trials, last = Container.runs
    assert (first[0], last[0]) == ("validate", "choose")
    assert {run.train.learning_rate for run in trials} == {1e-4, 3e-4}
    assert {run.tracking.sweep for run in trials} == {execution.pipeline_execution_name}
    best = json.loads((tmp_path / "best.json").read_text("utf-8"))
    assert best["model"].endswith("train-1/model.tar.gz")


# -- choosing ------------------------------------------------------------------------------------------------------

def result(objective: float | None, **settings: str) -> dict[str, bytes]:
    settings = {"evaluate.objective": "instance_loss", "name": "dog"} | settings
    return {"run.json": json.dumps({"settings": settings}).encode(),
            "result.json": json.dumps({"step": 2, "model": "model", "objective": objective}).encode()}


def write_archive(folder: Path, objective: float) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "model.tar.gz", "w:gz") as archive:
        for name, content in result(objective).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_the_result_with_the_lowest_objective_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {"train-1/job-a": result(0.5), "train-2/job-b": result(0.25), "train-3/job-c": result(None),
            "train-4/job-d": {}}
    stored = {f"{job}/output/model/{name}": content for job, files in jobs.items() for name, content in files.items()}
    stored |= {"train-1/checkpoints/dog/result.json": b"{}", "train-4/job-d/output/model/metrics.jsonl": b""}
    monkeypatch.setattr(folders, "read_files", lambda uri, wanted: {
        name: content for name, content in stored.items() if wanted(name)})
    sentence = job_results.choose("s3://bucket/sweeps/abc", tmp_path)
    model = "s3://bucket/sweeps/abc/train-2/job-b/output/model/"
    assert sentence == f"the best of 3 results is {model}, instance_loss=0.25"
    assert json.loads((tmp_path / "best.json").read_text("utf-8")) == {
        "model": model, "objective": "0.25", "name": "instance_loss", "finished": "2"}


def test_without_a_result_the_choice_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no result of a job in .*: see the logs of the training jobs"):
        job_results.choose(str(tmp_path), tmp_path)
    (tmp_path / "model.tar.gz").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"model.tar.gz is not a complete archive: delete it, or run its job again"):
        job_results.choose(str(tmp_path), tmp_path)


# -- the command ---------------------------------------------------------------------------------------------------

@pytest.fixture
def without_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreambooth.cli._exit_codes", [])
    monkeypatch.setattr(workflows, "build_shipped_spec", workflows.build_spec)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sagemaker"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sagemaker", None)


@pytest.mark.parametrize("command", ["check", "render"])
def test_without_the_sdk_one_sentence_names_the_package(
    without_sdk: None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("", "utf-8")
    monkeypatch.setattr("sys.argv", ["workflows", command, "--to", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        workflows.main()
    out, err = capfd.readouterr()
    sentence = "a SageMaker Pipeline needs a package: pip install 'dreambooth[aws]'\n"
    if command == "check":
        assert (exit_info.value.code, out, err) == (1, "", f"dreambooth: {sentence}")
        return
    assert err == f"dreambooth: the files in {tmp_path / 'sagemaker'} are left as they are: {sentence}"
    assert (tmp_path / "argo/dreambooth-train.yaml").is_file()
    assert not (tmp_path / "sagemaker").exists()


# -- submitting ----------------------------------------------------------------------------------------------------

@pytest.fixture
def stub(environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    monkeypatch.setenv("DREAMBOOTH_ROLE", ROLE)
    monkeypatch.setenv("DREAMBOOTH_S3", "s3://bucket/sweeps/")
    monkeypatch.setenv("DREAMBOOTH_IMAGE", IMAGE)
    client = folders.client("sagemaker")
    monkeypatch.setattr(folders, "client", lambda service: client)
    with Stubber(client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


def test_a_tuning_job_is_submitted_once(stub: Stubber) -> None:
    expected = build_tuning_request(replace(spec(), image=IMAGE), ROLE, "s3://bucket/sweeps", "mine")
    stub.add_response("create_hyper_parameter_tuning_job", {"HyperParameterTuningJobArn": "arn:aws:x"}, expected)
    assert sagemaker_submit.submit(spec(), "tuner", "mine").startswith("tuning job mine, at most 8 jobs")
    stub.add_client_error("create_hyper_parameter_tuning_job", "ResourceInUse")
    with pytest.raises(UserError, match=r"SageMaker has a tuning job mine already, .* or type --name NAME"):
        sagemaker_submit.submit(spec(), "tuner", "mine")
    with pytest.raises(ConfigError, match="HyperParameterTuningJobName is 'under_score', which does not match"):
        sagemaker_submit.submit(spec(), "tuner", "under_score")


@pytest.mark.parametrize("exists", [False, True])
def test_a_pipeline_is_created_or_updated_and_started(
    exists: bool, stub: Stubber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sagemaker_pipeline, "render_pipeline", lambda spec: "{}")
    arn = "arn:aws:sagemaker:us-east-1:123456789012:pipeline/dreambooth-sweep/execution/abcdefghijkl"
    definition = {"PipelineName": "dreambooth-sweep", "PipelineDefinition": "{}", "RoleArn": ROLE,
                  "ParallelismConfiguration": {"MaxParallelExecutionSteps": 4}}
    if exists:
        stub.add_response("describe_pipeline", {})
        stub.add_response("update_pipeline", {}, definition)
    else:
        stub.add_client_error("describe_pipeline", "ResourceNotFound")
        stub.add_response("create_pipeline", {}, definition)
    stub.add_response("start_pipeline_execution", {"PipelineExecutionArn": arn}, {
        "PipelineName": "dreambooth-sweep", "PipelineParameters": [
            {"Name": "RoleArn", "Value": ROLE}, {"Name": "S3Folder", "Value": "s3://bucket/sweeps"}]})
    assert arn in sagemaker_submit.submit(spec(), "pipeline")
    stub.add_response("describe_pipeline", {})
    stub.add_response("update_pipeline", {}, definition)
    stub.add_client_error("start_pipeline_execution", "InternalFailure", http_status_code=500)
    with pytest.raises(UserError, match=r"may have started: look with aws sagemaker list-pipeline-executions .*sweep,"):
        sagemaker_submit.submit(spec(), "pipeline")


@pytest.mark.parametrize("kind", sagemaker_submit.KINDS)
def test_a_credential_and_missing_settings_are_refused(
    kind: str, stub: Stubber, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="looks like a credential") as caught:
        sagemaker_submit.submit(spec("dataset.class_prompt=a dog hf_hiddenhiddenhiddenhidden"), kind)
    assert "hidden" not in str(caught.value)
    with pytest.raises(UserError, match=NO_INSTANCE_TYPE):
        sagemaker_submit.submit(spec(*CPU), kind)
    monkeypatch.delenv("DREAMBOOTH_S3")
    with pytest.raises(UserError, match=r"^DREAMBOOTH_S3 must be set: type DREAMBOOTH_S3=s3://BUCKET/FOLDER before"):
        sagemaker_submit.submit(spec(), kind)
