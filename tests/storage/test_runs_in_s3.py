"""Runs that read from S3, copy their result and checkpoints there, and are resumed on another machine."""

import json
import os
import re
import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreambooth.config.schema import Config
from dreambooth.config.storage import Storage
from dreambooth.errors import Interrupted, UserError
from dreambooth.runs import checkpoint_files, remote_mirror
from dreambooth.storage import __main__ as storage_command
from dreambooth.storage import folders, manifest, run_inputs
from dreambooth.utils.signals import StopRequest, catch_stop_signals
from tests.storage.bucket_content import content, prefix
from tests.support.faults import FAST
from tests.support.s3_server import (
    Server,
    in_bucket,
    plain_client,
    write_model,
)
from tests.support.warm_python import PYTHON

# -- runs --------------------------------------------------------------------------------------------------------------

def make_config(tmp_path: Path, **paths: str) -> Config:
    config = Config(storage=Storage(cache=str(tmp_path / "cache")))
    for key, value in paths.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize("words, sentence", [
    ({"upload": "runs"}, "storage.upload must be s3://BUCKET/FOLDER, or null for none, not runs"),
    ({"upload": "s3://bucket"}, "storage.upload must be"), ({"upload": "s3:///x"}, "storage.upload must be"),
    ({"upload": "s3://bucket//"}, "storage.upload must be"), ({"upload": ""}, "storage.upload must be"),
    ({"checkpoints": True}, "storage.checkpoints must be false unless storage.upload is set"),
    ({"parallel": 0}, "storage.parallel must be from 1 to 64, not 0"), ({"parallel": 65}, "not 65"),
])
def test_storage_settings_are_validated(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Storage(**words)


def test_the_s3_inputs_of_a_run_are_downloaded(server: Server, tmp_path: Path, uri: str) -> None:
    write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", f"{uri}/base")
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/photos/a.jpg", Body=b"a")
    config = make_config(tmp_path, model__source=f"{uri}/base", dataset__instance_dir=f"{uri}/photos")
    fetched = run_inputs.fetch_inputs(config, tmp_path / "run")
    assert content(Path(fetched.dataset.instance_dir or "")) == {"a.jpg": b"a"}
    assert (Path(fetched.model.source) / "model_index.json").is_file()
    assert config.model.source.startswith("s3://"), "the caller's own config was changed"


def test_a_base_model_must_be_complete(server: Server, tmp_path: Path, uri: str) -> None:
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/base/model_index.json", Body=b"{}")
    with pytest.raises(UserError, match="half uploaded"):
        run_inputs.fetch_inputs(make_config(tmp_path, model__source=f"{uri}/base"), tmp_path / "run")


def test_a_single_file_model_needs_no_manifest(server: Server, tmp_path: Path, uri: str) -> None:
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/toy.safetensors", Body=b"weights")
    config = make_config(tmp_path, model__source=f"{uri}/toy.safetensors", model__vae=f"{uri}/toy.safetensors")
    model = run_inputs.fetch_inputs(config, tmp_path / "run").model
    assert Path(model.source).name == "toy.safetensors"
    assert Path(model.source).read_bytes() == Path(model.vae or "").read_bytes() == b"weights"


def test_a_run_is_not_resumed_with_changed_photos(server: Server, tmp_path: Path, uri: str) -> None:
    config = make_config(tmp_path, dataset__instance_dir=uri)
    run = tmp_path / "run"
    run.mkdir()
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"a")
    run_inputs.fetch_inputs(config, run)
    run_inputs.fetch_inputs(config, run)
    with pytest.raises(UserError, match="has other content"):  # the same files, decoded to other colours
        run_inputs.fetch_inputs(config, run, lambda folder: "-srgb")
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"b")
    with pytest.raises(UserError, match=r"type checkpoint\.resume=never"):
        run_inputs.fetch_inputs(config, run)
    config.checkpoint.resume = "never"
    assert content(Path(run_inputs.fetch_inputs(config, run).dataset.instance_dir or "")) == {"a.jpg": b"b"}


def write_run(folder: Path, steps: int) -> None:
    """Write a run folder with a model, a result and a checkpoint every 100 steps."""
    write_model(folder / "model", steps)
    (folder / "result.json").write_text("{}")
    for step in range(100, steps + 1, 100):
        checkpoint_dir = folder / f"checkpoints/step-{step:06d}"
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        (checkpoint_dir / "state.json").write_text(json.dumps({"step": step, "sizes": {}}))


def test_a_result_and_checkpoints_are_uploaded_and_downloaded_again(server: Server, tmp_path: Path, uri: str) -> None:
    spec, run = Storage(upload=uri, checkpoints=True), tmp_path / "run"
    with remote_mirror.mirror_run(spec, run, "auto", StopRequest()) as upload_result:
        write_run(run, 100)
        upload_result(SimpleNamespace(step=100))
        upload_result(SimpleNamespace(step=100))  # as when the command is repeated
    assert folders.list_complete_folders(f"{uri}/run/checkpoints") == [f"{uri}/run/checkpoints/step-000100"]
    assert "result.json" in (folders.read_manifest(f"{uri}/run/result-000100") or {})
    other = tmp_path / "elsewhere" / "run"
    with remote_mirror.mirror_run(spec, other, "auto", StopRequest()):
        assert json.loads((other / "checkpoints/step-000100/state.json").read_text())["step"] == 100
        assert [entry.name for entry in (other / "checkpoints").glob("step-*")] == ["step-000100"]
    with pytest.raises(UserError, match=r"type checkpoint\.resume=auto"), \
            remote_mirror.mirror_run(spec, other, "never", StopRequest()):
        pass


def test_a_half_uploaded_result_of_another_machine_does_not_block_the_upload(
        server: Server, tmp_path: Path, uri: str) -> None:
    """The machines have the same weights, but files that differ between machines, with times and paths."""
    for machine in ("a", "b", "c"):
        write_run(tmp_path / machine / "run", 100)
        (tmp_path / machine / "run/result.json").write_text(f'{{"seconds": "{machine}"}}')
    first, spec = f"{uri}/run/result-000100", Storage(upload=uri)
    plain_client().put_object(Bucket="tests", Key=f"{prefix(first)}/result.json", Body=b'{"seconds": "a"}')
    for machine in ("b", "b", "c"):  # the command of b is repeated; c finds a complete upload
        with remote_mirror.mirror_run(spec, tmp_path / machine / "run", "auto", StopRequest()) as upload_result:
            upload_result(SimpleNamespace(step=100))
    assert in_bucket("tests", prefix(first)) == {"result.json": b'{"seconds": "a"}'}
    second = in_bucket("tests", f"{prefix(first)}.2")
    assert second["result.json"] == b'{"seconds": "b"}' and manifest.NAME in second
    assert in_bucket("tests", f"{prefix(first)}.3") == {}


def test_an_interrupted_upload_of_a_result_leaves_no_file_that_differs_between_machines(
        server: Server, tmp_path: Path, uri: str) -> None:
    write_run(tmp_path / "run", 100)
    server.fault = lambda number, method: "denied" if "partNumber=4" in server.calls[number][1] else None
    spec = Storage(upload=uri, parallel=1)
    with pytest.raises(UserError, match="no permission"), \
            remote_mirror.mirror_run(spec, tmp_path / "run", "auto", StopRequest()) as upload_result:
        upload_result(SimpleNamespace(step=100))
    assert "result.json" not in in_bucket("tests", prefix(f"{uri}/run/result-000100"))


@pytest.mark.slow
def test_a_result_with_other_weights_has_an_address_of_its_own(server: Server, tmp_path: Path, uri: str) -> None:
    """The weights of two trainings on a GPU differ in their last bits: the second upload must not fail at the end."""
    run, first = tmp_path / "run", f"{uri}/run/result-000100"

    def upload(with_command: bool) -> None:
        if with_command:
            storage_command.upload(storage_command.parser().parse_args(["upload", "--result", str(run), first]))
        else:
            with remote_mirror.mirror_run(Storage(upload=uri), run, "auto", StopRequest()) as upload_result:
                upload_result(SimpleNamespace(step=100))

    addresses = [first, first, f"{first}.2", f"{first}.3"]
    for number, weights in enumerate((1, 1, 2, 3)):
        write_run(run, 100)
        (run / "result.json").write_text(f'{{"seconds": {number}}}')
        (run / "model/model_index.json").write_text(str(weights))
        upload(with_command=number in (1, 3))
        assert "result.json" in (folders.read_manifest(addresses[number]) or {})
    assert in_bucket("tests", prefix(first))["result.json"] == b'{"seconds": 0}', "an equal model was sent again"
    assert folders.list_complete_folders(f"{uri}/run") == addresses[1:]


def test_an_upload_that_s3_would_refuse_ends_a_run_before_it_begins(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bucket nowhere does not exist: type another name, or create it"), \
            remote_mirror.mirror_run(Storage(upload="s3://nowhere/runs"), tmp_path / "run", "auto", StopRequest()):
        pytest.fail("the run began")


def test_a_stop_request_ends_the_upload_of_a_result_which_is_continued_later(
        server: Server, tmp_path: Path, uri: str) -> None:
    write_run(tmp_path / "run", 100)
    signals = [signal.SIGTERM]

    def fault(number: int, method: str) -> None:
        if method == "PUT" and signals:
            os.kill(os.getpid(), signals.pop())

    server.fault = fault
    result = f"{uri}/run/result-000100"
    with pytest.raises(Interrupted, match=r"SIGTERM: the run is finished, .*; repeat the command to copy it to S3"), \
            catch_stop_signals() as stop, \
            remote_mirror.mirror_run(Storage(upload=uri, parallel=1), tmp_path / "run", "auto", stop) as upload_result:
        upload_result(SimpleNamespace(step=100))
    assert folders.read_manifest(result) is None
    with remote_mirror.mirror_run(Storage(upload=uri), tmp_path / "run", "auto", StopRequest()) as upload_result:
        upload_result(SimpleNamespace(step=100))
    assert folders.read_manifest(result)


def test_the_end_of_a_run_abandons_the_copy_of_an_older_checkpoint(
        server: Server, tmp_path: Path, uri: str) -> None:
    write_run(tmp_path / "run", 100)
    mirror = remote_mirror.CheckpointMirror(tmp_path / "run", uri, 1)

    def fault(number: int, method: str) -> None:
        if method == "PUT" and not mirror._closing.is_set():  # the first part of step 100 is sent as the run ends
            write_run(tmp_path / "run", 200)
            mirror._newest = tmp_path / "run/checkpoints/step-000200"
            mirror._closing.set()

    server.fault = fault
    mirror._copy_newest()
    mirror._copy_newest()
    assert [address.rpartition("/")[2] for address in folders.list_complete_folders(f"{uri}/checkpoints")] == [
        "step-000200"]


def test_a_half_uploaded_checkpoint_of_another_machine_does_not_block_the_upload(
        server: Server, tmp_path: Path, uri: str) -> None:
    spec, address = Storage(upload=uri, checkpoints=True), f"{uri}/run/checkpoints"
    plain_client().put_object(Bucket="tests", Key=f"{prefix(address)}/step-000100/state.json", Body=b"other")
    with remote_mirror.mirror_run(spec, tmp_path / "b/run", "auto", StopRequest()):
        write_run(tmp_path / "b/run", 100)
    assert folders.list_complete_folders(address) == [f"{address}/step-000100.2"]
    with remote_mirror.mirror_run(spec, tmp_path / "c/run", "auto", StopRequest()):
        assert [entry.name for entry in (tmp_path / "c/run/checkpoints").glob("step-*")] == ["step-000100"]
    assert len(folders.list_complete_folders(address)) == 1


def test_a_result_that_cannot_be_uploaded_is_an_error(server: Server, tmp_path: Path, uri: str) -> None:
    write_run(tmp_path / "run", 100)
    server.fault = lambda number, method: "denied" if method == "PUT" else None
    with pytest.raises(UserError, match="no permission"), \
            remote_mirror.mirror_run(Storage(upload=uri), tmp_path / "run", "auto", StopRequest()) as upload_result:
        upload_result(SimpleNamespace(step=100))


def test_a_checkpoint_that_cannot_be_uploaded_is_only_a_warning(server: Server, tmp_path: Path, uri: str,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    with remote_mirror.mirror_run(Storage(upload=uri, checkpoints=True), tmp_path / "run", "auto", StopRequest()):
        write_run(tmp_path / "run", 100)
        server.fault = lambda number, method: "denied" if method == "PUT" else None
    assert "checkpoint step-000100 is not in S3" in caplog.text


def test_a_checkpoint_that_cannot_be_uploaded_is_retried_at_growing_intervals(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    now, reads, read = [1000.0], list[Path](), manifest.hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(remote_mirror, "time", SimpleNamespace(monotonic=lambda: now[0]))
    write_run(tmp_path / "run", 100)
    mirror = remote_mirror.CheckpointMirror(tmp_path / "run", uri, 2)
    server.fault = lambda number, method: "denied" if method == "PUT" else None
    tries = []
    for _ in range(1000):  # polls, POLL_SECONDS apart
        server.calls.clear()
        mirror._copy_newest()
        tries += [now[0]] if server.calls else []
        now[0] += remote_mirror.POLL_SECONDS
        if len(tries) > 14:  # too many
            break
    assert [later - sooner for sooner, later in pairwise(tries)] == [
        10, 20, 40, 80, 160, 320, 600, 600, 600, 600, 600, 600, 600]
    assert caplog.text.count("checkpoint step-000100 is not in S3") == 1
    assert len(reads) == 1, "the checkpoint was read again for each attempt"
    write_run(tmp_path / "run", 200)  # a new checkpoint is tried at once, and S3 accepts it
    server.fault = lambda number, method: None
    mirror._copy_newest()
    mirror.start()
    mirror.finish()
    assert [address.rpartition("/")[2] for address in folders.list_complete_folders(f"{uri}/checkpoints")] == [
        "step-000100", "step-000200"]


@pytest.mark.parametrize("damaged", ["step-000100", "step-000300"])
def test_a_damaged_checkpoint_does_not_hide_those_in_s3_and_is_not_uploaded(
        server: Server, tmp_path: Path, uri: str, damaged: str) -> None:
    spec = Storage(upload=uri, checkpoints=True)
    with remote_mirror.mirror_run(spec, tmp_path / "a/run", "auto", StopRequest()):
        write_run(tmp_path / "a/run", 100)
    broken = tmp_path / "b/run/checkpoints" / damaged
    broken.mkdir(parents=True)
    (broken / "trained.safetensors").write_bytes(b"half")
    with remote_mirror.mirror_run(spec, tmp_path / "b/run", "auto", StopRequest()):
        assert checkpoint_files.latest(broken.parent) == broken.parent / "step-000100"
    assert folders.list_complete_folders(f"{uri}/run/checkpoints") == [f"{uri}/run/checkpoints/step-000100"]


@pytest.mark.slow
def test_a_run_from_s3_to_s3_is_resumed_on_another_machine(running: Server, tmp_path: Path) -> None:
    assets = Path(folders.__file__).parents[1] / "assets"
    folders.upload(assets / "tiny-sd", "s3://tests/whole/base")
    for photo in (assets / "demo").iterdir():
        plain_client().upload_file(str(photo), "tests", f"whole/photos/{photo.name}")
    command = [PYTHON, "-m", "dreambooth.train", *FAST, "model.source=s3://tests/whole/base", "dataset=s3",
               "dataset.instance_dir=s3://tests/whole/photos", "dataset.instance_prompt=a photo of a zwx toy",
               "dataset.class_prompt=a photo of a toy", "storage.upload=s3://tests/whole/runs",
               "storage.checkpoints=true"]

    def train(machine: str, *more: str) -> str:
        done = subprocess.run([*command, f"run_root={tmp_path / machine}", *more], capture_output=True, text=True,
                              check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    train("one", "train.max_train_steps=2")
    resumed = train("two", "train.max_train_steps=4")
    assert "resuming after step 2" in resumed
    assert "metrics.jsonl lacks the loss of 2 of the 2 steps before this start" in resumed
    [name] = {key.split("/")[0] for key in in_bucket("tests", "whole/runs")}
    assert folders.read_manifest(f"s3://tests/whole/runs/{name}/result-000004")
    generated = subprocess.run(
        [PYTHON, "-m", "dreambooth.generate", f"run=s3://tests/whole/runs/{name}/result-000004", "num_images=1",
         "num_inference_steps=2", f"out={tmp_path / 'out'}"], check=False, cwd=tmp_path)
    assert generated.returncode == 0
