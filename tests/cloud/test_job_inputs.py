"""What a job reads: photos, models and settings that must be in S3, or are sent there once."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dreambooth.cloud import docker_backend, sweep_results
from dreambooth.cloud.docker_backend import DockerBackend
from dreambooth.cloud.follower import Follower
from dreambooth.cloud.job import COMPLETED, FAILED
from dreambooth.cloud.job_preparation import prepare_jobs
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.errors import ConfigError
from dreambooth.storage import __main__ as storage_command
from dreambooth.storage import folders
from hydra_plugins.dreambooth_sagemaker import _prepare
from tests.cloud.jobs import IMAGE, INSPECT, PHOTOS, ROLE, ROOT, config_of, jobs_of, request_of
from tests.support.s3_server import plain_client, serving

pytestmark = pytest.mark.usefixtures("environment")


def test_a_half_uploaded_base_is_found_before_a_job_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with serving():
        plain_client().create_bucket(Bucket="bucket")
        plain_client().put_object(Bucket="bucket", Key="base/model_index.json", Body=b"{}")
        with pytest.raises(ConfigError, match="half uploaded"):
            request_of("hardware=g4dn", *PHOTOS, "model.source=s3://bucket/base")


def test_folders_of_the_submitting_machine_are_not_sent() -> None:
    sent = request_of("hardware=g4dn", *PHOTOS, "run_root=here", "storage.cache=there",
                      "train.compile_cache=code")["HyperParameters"]
    assert not sent.keys() & {"run_root", "storage.cache", "train.compile_cache", "dataset", "dataset.instance_dir"}


@pytest.mark.parametrize("mode", ["aws", "docker"])
def test_job_names_do_not_depend_on_the_machine_but_on_the_photos(
        mode: str, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(machine: str, photo: bytes, *words: str) -> str:
        folder = tmp_path / machine / f"photos of {machine}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.jpg").write_bytes(photo)
        config = config_of("hardware=g4dn", "dataset=folder", f"dataset.instance_dir='{folder}'",
                          "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog",
                          f"run_root={tmp_path}/{machine}/runs", f"storage.cache={tmp_path}/{machine}/cache", *words)
        backend = DockerBackend(tmp_path / "jobs") if mode == "docker" else SageMakerBackend()
        return prepare_jobs(_prepare.read_jobs([config]), "mine", backend, mode)[0].name

    with serving():
        plain_client().create_bucket(Bucket="bucket")
        first = name("laptop", b"a")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
        assert name("desktop", b"a") == first
        assert name("desktop", b"a", "tracking.experiment=other", "hardware.price_usd_hour=2") == first
        assert name("desktop", b"b") != first, "a job on other photos is another job"
        assert name("laptop", b"a", "train.seed=1") != first


def test_other_photos_at_the_same_s3_path_are_another_job() -> None:
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "inspect", INSPECT)
        plain_client().create_bucket(Bucket="bucket")
        names = []
        for body in (b"a", b"a", b"b"):
            plain_client().put_object(Bucket="bucket", Key="photos/a.jpg", Body=body)
            names.append(jobs_of(config_of("hardware=g4dn", *PHOTOS))[0].name)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("words, sentences", [
    (["dataset.instance_dir=s3://bucket/phtos", "dataset.class_dir=s3://bucket/dogs",
      "evaluate.reference_dir=s3://bucket/dogs", "model.source=s3://bucket/base.ckpt", "model.vae=s3://bucket/vae",
      "evaluate.prompts=s3://bucket/p.txt", "evaluate.lpips=s3://bucket/x.safetensors",
      "checkpoint.resume=s3://bucket/photos"], [
          "there is nothing in s3://bucket/phtos: type dataset.instance_dir=s3://",
          "type dataset.class_dir=s3://BUCKET/FOLDER", "type evaluate.reference_dir=s3://BUCKET/FOLDER",
          "type model.source=s3://BUCKET/FILE", "type model.vae=s3://BUCKET/FOLDER",
          "type evaluate.prompts=s3://BUCKET/FILE", "type evaluate.lpips=s3://BUCKET/FILE", "half uploaded"]),
    (["dataset.instance_dir=s3://bucket/phot"], ["there is nothing in s3://bucket/phot:"]),
    (["dataset.instance_dir=s3://bucket/photos/a.jpg"], ["there is nothing in s3://bucket/photos/a.jpg:"]),
])
def test_missing_s3_inputs_are_reported_before_submission(words: list[str], sentences: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "inspect", INSPECT)
        plain_client().create_bucket(Bucket="bucket")
        plain_client().put_object(Bucket="bucket", Key="photos/a.jpg", Body=b"a")
        request_of("hardware=g4dn", *PHOTOS)
        with pytest.raises(ConfigError) as caught:
            request_of("hardware=g4dn", *PHOTOS, *words)
    assert [sentence for sentence in sentences if sentence not in str(caught.value)] == []


def test_a_single_file_base_in_s3_is_passed_by_its_address() -> None:
    """A channel can only be a folder; the run downloads the file itself."""
    with pytest.MonkeyPatch.context() as patch, serving():
        patch.setattr(folders, "inspect", INSPECT)
        plain_client().create_bucket(Bucket="bucket")
        for key in ("photos/a.jpg", "base.safetensors"):
            plain_client().put_object(Bucket="bucket", Key=key, Body=b"a")
        sent = request_of("hardware=g4dn", *PHOTOS, "model.source=s3://bucket/base.safetensors")
    assert sent["HyperParameters"]["model.source"] == "s3://bucket/base.safetensors"
    assert [channel["ChannelName"] for channel in sent["InputDataConfig"]] == ["images"]


@pytest.mark.parametrize("key, name, sentence", [
    ("model.source", "base.safetensors", "is a file on this machine: type model.source=s3://BUCKET/FILE"),
    ("model.vae", "vae.safetensors", "is a file on this machine: type model.vae=s3://BUCKET/FILE"),
    ("model.vae", "vae", "is a folder on this machine: type model.vae=s3://BUCKET/FOLDER"),
    ("evaluate.prompts", "p.txt", "is a file on this machine: type evaluate.prompts=s3://BUCKET/FILE"),
    ("evaluate.lpips", "x.safetensors", "is a file on this machine: type evaluate.lpips=s3://BUCKET/FILE"),
    ("evaluate.dino", "dino", "type evaluate.dino=HUB_ID"),
])
def test_local_paths_that_a_job_cannot_read_are_refused(
        key: str, name: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("a {subject}") if path.suffix else path.mkdir()
    with pytest.raises(ConfigError) as caught:
        request_of("hardware=g4dn", *PHOTOS, f"{key}={path}", "evaluate.encoder=paper")
    assert sentence in str(caught.value)


def test_paths_that_a_job_can_read_are_sent() -> None:
    words = ["model.vae=stabilityai/sd-vae-ft-mse", "evaluate.prompts=object", "checkpoint.resume=s3://bucket/step-000100",
             "evaluate.lpips=s3://bucket/x.safetensors", "evaluate.reference_dir=s3://bucket/dogs"]
    sent = request_of("hardware=g4dn", *PHOTOS, *words)["HyperParameters"]
    assert {f"{key}={value}" for key, value in sent.items()} >= {*words}
    assert "evaluate.prompts" in request_of("hardware=g4dn", *PHOTOS, "evaluate.prompts=s3://bucket/p.txt")["HyperParameters"]


def test_local_photos_are_uploaded_once_with_progress(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    words = ["hardware=g4dn", "dataset=folder", f"dataset.instance_dir={tmp_path}/photos",
             "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog"]
    with serving():
        plain_client().create_bucket(Bucket="bucket")
        found = jobs_of(config_of(*words, "train.seed=0"), config_of(*words, "train.seed=1", number=1))
        assert re.search(r"^to s3://bucket/sweeps/inputs/photos-\w+ 1/1 ", capsys.readouterr().out, re.M)
        places = {job.request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] for job in found}
        [place] = places
        assert place.startswith("s3://bucket/sweeps/inputs/photos-")
        assert "a.jpg" in (folders.read_manifest(place.rstrip("/")) or {})
    assert "dataset.instance_dir" not in found[0].request["HyperParameters"]


def test_containers_get_the_files_that_sagemaker_provides(engine: str, tmp_path: Path) -> None:
    """Six jobs with a fake engine; the real image has tests of its own."""
    backend = DockerBackend(tmp_path / "jobs")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"a")
    words = ["hardware=g4dn", "dataset=folder", f"dataset.instance_dir={photos}", "dataset.instance_prompt=a zwx dog",
             "dataset.class_prompt=a dog"]
    configs = [config_of(*words, f"train.seed={i}", number=i) for i in range(6)]
    jobs = prepare_jobs(_prepare.read_jobs(configs), "six", backend, "docker")
    states = [sweep_results.fail_without_objective(state) for state in Follower(
        backend, jobs, max_parallel=2, poll_seconds=0.05, stop_on_interrupt=False, follow_hint="").run()]
    assert [state.status for state in states] == [COMPLETED] * 3 + [FAILED] + [COMPLETED] * 2
    assert states[3].reason == "exit code 1: photo.jpg is broken"
    assert (states[0].step, states[0].loss, sweep_results.objective(states[0])) == (2, 0.125, 0.5)
    config = tmp_path / "jobs" / jobs[0].name / "input/config"
    assert json.loads((config / "hyperparameters.json").read_text())["train.seed"] == "0"
    assert list(json.loads((config / "inputdataconfig.json").read_text())) == ["images"]
    assert json.loads((config / "resourceconfig.json").read_text())["hosts"] == ["algo-1"]


@pytest.mark.parametrize(("uri", "words"), [
    ("http://127.0.0.1:5000", ["--network", "host"]), ("http://localhost:5000", ["--network", "host"]),
    ("https://mlflow.example.com", []), ("http://[::1]:5000", ["--network", "host"]),
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/x", []),
    ("arn:aws:sagemaker:us-east-1:123456789012:mlflow-app/app-X", [])])
def test_a_container_reaches_a_server_on_this_machine(uri: str, words: list[str]) -> None:
    assert docker_backend.network_options({"MLFLOW_TRACKING_URI": uri, "DREAMBOOTH_SWEEP": "six"}) == words


def test_a_missing_engine_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it" in docker_backend.DockerBackend(tmp_path).find_problems({})[0]


def test_the_notebooks_commands_compose_and_its_code_compiles() -> None:
    cells = json.loads((ROOT / "examples/sagemaker.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    typed = [shlex.split(re.sub(r"\\\n", "", text).format(BUCKET="s3://b/p", ROLE=ROLE, IMAGE=IMAGE)) for text in code
             if text.startswith("!")]
    sweep = next(words for words in typed if words[2] == "dreambooth.train")
    words = [word.replace("=1e-6,2e-6", "=1e-6") for word in sweep[3:] if word != "-m"]
    assert request_of(*words)["ResourceConfig"]["InstanceType"] == "ml.g5.xlarge"
    uploads = [words for words in typed if words[2] == "dreambooth.storage"]
    assert storage_command.parser().parse_args(uploads[0][3:]).uri == "s3://b/p/photos"
    for text in code:
        if not text.startswith("!"):
            compile(text, "cell", "exec")
