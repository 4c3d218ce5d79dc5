"""`mode=docker`: jobs in containers on this machine, with a fake container engine."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from dreambooth.cloud import docker_backend
from dreambooth.cloud.docker_backend import DockerBackend
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Job, Unreachable
from dreambooth.errors import UserError

ENGINE = """#!/bin/sh
# Fake docker with one container, which runs while the file `alive` exists.
here=$(dirname "$0")
echo "$@" >> "$here/calls"
[ ! -f "$here/down" ] || { echo "Cannot connect to the daemon" >&2; exit 1; }
case "$1" in
  container) [ -f "$here/alive" ] || { echo "Error response from daemon: No such container: job" >&2; exit 1; }
    echo true;;
  stop) [ ! -f "$here/slow" ] || sleep 5
    [ -f "$here/alive" ] || { echo "Error response from daemon: No such container: job" >&2; exit 1; };;
  run) [ ! -f "$here/alive" ] || { echo "Conflict. The container name is already in use" >&2; exit 125; }
    echo 'training 1/2  9.9/s  loss 0.5'; exit 1;;
esac
"""
JOB = Job(0, "job", (), {
    "AlgorithmSpecification": {"TrainingImage": "image"}, "Environment": {"DREAMBOOTH_SWEEP": "mine"},
    "HyperParameters": {}, "ResourceConfig": {"InstanceCount": 1, "InstanceType": "local"}}, 2)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the fake engine on PATH; returns its folder."""
    path = tmp_path / "bin" / "docker"
    path.parent.mkdir()
    path.write_text(ENGINE)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path.parent


def calls(engine: Path) -> list[str]:
    return [line.split()[0] for line in (engine / "calls").read_text().splitlines()]


def start_earlier(tmp_path: Path, **texts: str) -> Path:
    """Make the folder of a job that an earlier command has started."""
    base = tmp_path / "jobs/job"
    for folder in docker_backend.FOLDERS:
        (base / folder).mkdir(parents=True)
    (base / "log.txt").write_text("training 1/2  9.9/s  loss 0.25\n")
    for name, text in texts.items():
        (base / {"result": "model/result.json", "failure": "output/failure"}[name]).write_text(text)
    return base


def wait_for_end(backend: DockerBackend) -> Any:
    for _ in range(200):
        state = backend.poll(JOB)
        if state.ended:
            return state
        time.sleep(0.05)
    raise AssertionError("it did not end")


@pytest.mark.parametrize("resubmit", [False, True])
def test_a_container_of_an_earlier_command_is_followed(engine: Path, tmp_path: Path, resubmit: bool) -> None:
    base, backend = start_earlier(tmp_path), DockerBackend(tmp_path / "jobs", resubmit=resubmit)
    (engine / "alive").touch()
    assert backend.submit(JOB).status == RUNNING
    state = backend.poll(JOB)
    assert (state.status, state.step, state.loss) == (RUNNING, 1, 0.25)
    (base / "model/result.json").write_text('{"objective": 0.5}')
    assert backend.poll(JOB).status == RUNNING, "it is completed only when its container has ended"
    (engine / "alive").unlink()
    assert (backend.poll(JOB).status, backend.poll(JOB).result) == (COMPLETED, {"objective": 0.5})
    assert "run" not in calls(engine)


def test_a_job_does_not_end_because_the_engine_does_not_answer(engine: Path, tmp_path: Path) -> None:
    start_earlier(tmp_path)
    (engine / "down").touch()
    backend = DockerBackend(tmp_path / "jobs")
    for method in (backend.submit, backend.poll):
        with pytest.raises(Unreachable, match=r"docker does not answer \(Cannot connect"):
            method(JOB)


def test_a_failed_job_runs_again_only_with_resubmit(engine: Path, tmp_path: Path) -> None:
    base = start_earlier(tmp_path, failure="photo.jpg is broken")
    state = DockerBackend(tmp_path / "jobs").submit(JOB)
    assert (state.status, state.reason) == (
        FAILED, "it ended without a result: photo.jpg is broken; hydra.launcher.resubmit=true runs it again")
    assert "run" not in calls(engine)
    backend = DockerBackend(tmp_path / "jobs", resubmit=True)
    assert backend.submit(JOB).status == RUNNING
    assert (base / "output-1/failure").read_text() == "photo.jpg is broken"
    assert wait_for_end(backend).reason.startswith("exit code 1: training 1/2")


def test_output_of_another_user_is_renamed(
        engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`output` belongs to the user of the image: a host user with another ID may not delete files in it."""
    base = start_earlier(tmp_path, failure="broken")
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent == base / "output":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert DockerBackend(tmp_path / "jobs", resubmit=True).submit(JOB).status == RUNNING


def test_a_folder_that_cannot_be_used_is_a_user_error(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("in the way")
    with pytest.raises(UserError, match=r"jobs/job cannot be used .*: make yourself its owner, or type"):
        DockerBackend(tmp_path / "jobs").submit(JOB)


def test_a_result_that_is_not_json_is_reported(engine: Path, tmp_path: Path) -> None:
    start_earlier(tmp_path, result="{")
    state = DockerBackend(tmp_path / "jobs").submit(JOB)
    assert "result.json cannot be read" in state.result["problem"]


def test_stop_reports_what_the_engine_says(
        engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_earlier(tmp_path)
    backend = DockerBackend(tmp_path / "jobs")
    assert not backend.stop(JOB), "there is no such container"
    (engine / "alive").touch()
    assert backend.stop(JOB)
    (engine / "alive").unlink()
    assert backend.poll(JOB).status == STOPPED
    (engine / "down").touch()
    with pytest.raises(UserError, match=r"docker does not stop job \(Cannot connect to the daemon\)"):
        backend.stop(JOB)


def test_stop_does_not_wait_for_the_container_to_save(
        engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_backend, "STOP_REPLY_TIMEOUT", 0.2)
    (engine / "alive").touch()
    (engine / "slow").touch()
    begin = time.monotonic()
    assert DockerBackend(tmp_path / "jobs").stop(JOB)
    assert time.monotonic() - begin < 3


def test_credentials_are_passed_without_their_values_in_the_command(
        engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in docker_backend.CREDENTIAL_VARIABLES:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    backend = DockerBackend(tmp_path / "jobs")
    backend.submit(JOB)
    wait_for_end(backend)
    [command] = [line for line in (engine / "calls").read_text().splitlines() if line.startswith("run ")]
    assert "--env AWS_SECRET_ACCESS_KEY --env DREAMBOOTH_SWEEP=mine" in command
    assert "AWS_ACCESS_KEY_ID" not in command
    assert "hidden" not in command


def test_jobs_do_not_share_a_gpu(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(engine))
    backend = DockerBackend(tmp_path / "jobs")
    assert backend.limit_parallel(4) == 4
    (engine / "nvidia-smi").touch(0o755)
    assert backend.limit_parallel(4) == 1


def test_several_hosts_are_refused(engine: Path, tmp_path: Path) -> None:
    assert DockerBackend(tmp_path).find_problems({"ResourceConfig": {"InstanceCount": 2}}) == [
        "mode=docker runs one host: type hydra.launcher.instance_count=1"]
