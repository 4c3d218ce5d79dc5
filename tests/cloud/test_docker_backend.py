"""`mode=docker`: jobs in containers of this machine, of an earlier command too, by a stand-in for the engine."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from dreambooth.cloud import docker_backend
from dreambooth.cloud.docker_backend import Containers
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Job, Unreachable
from dreambooth.errors import UserError

ENGINE = """#!/bin/sh
# Stands for docker: one container, which runs while the file `alive` is there.
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
    """The folder of the engine."""
    path = tmp_path / "bin" / "docker"
    path.parent.mkdir()
    path.write_text(ENGINE)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path.parent


def calls(engine: Path) -> list[str]:
    return [line.split()[0] for line in (engine / "calls").read_text().splitlines()]


def begun_before(tmp_path: Path, **texts: str) -> Path:
    base = tmp_path / "jobs/job"
    for folder in docker_backend.FOLDERS:
        (base / folder).mkdir(parents=True)
    (base / "log.txt").write_text("training 1/2  9.9/s  loss 0.25\n")
    for name, text in texts.items():
        (base / {"result": "model/result.json", "failure": "output/failure"}[name]).write_text(text)
    return base


def ended(backend: Containers) -> Any:
    for _ in range(200):
        seen = backend.look(JOB)
        if seen.ended:
            return seen
        time.sleep(0.05)
    raise AssertionError("it runs on")


@pytest.mark.parametrize("resubmit", [False, True])
def test_a_container_of_an_earlier_command_is_followed(engine: Path, tmp_path: Path, resubmit: bool) -> None:
    base, backend = begun_before(tmp_path), Containers(tmp_path / "jobs", resubmit=resubmit)
    (engine / "alive").touch()
    assert backend.submit(JOB).status == RUNNING
    seen = backend.look(JOB)
    assert (seen.status, seen.step, seen.loss) == (RUNNING, 1, 0.25)
    (base / "model/result.json").write_text('{"objective": 0.5}')
    assert backend.look(JOB).status == RUNNING, "it is not done before its container is gone"
    (engine / "alive").unlink()
    assert (backend.look(JOB).status, backend.look(JOB).result) == (COMPLETED, {"objective": 0.5})
    assert "run" not in calls(engine)


def test_an_engine_that_does_not_answer_is_no_end_of_a_job(engine: Path, tmp_path: Path) -> None:
    begun_before(tmp_path)
    (engine / "down").touch()
    backend = Containers(tmp_path / "jobs")
    for ask in (backend.submit, backend.look):
        with pytest.raises(Unreachable, match=r"docker does not answer \(Cannot connect"):
            ask(JOB)


def test_what_failed_runs_again_only_if_told(engine: Path, tmp_path: Path) -> None:
    base = begun_before(tmp_path, failure="photo.jpg is broken")
    seen = Containers(tmp_path / "jobs").submit(JOB)
    assert (seen.status, seen.reason) == (
        FAILED, "it ended without a result: photo.jpg is broken; hydra.launcher.resubmit=true begins it again")
    assert "run" not in calls(engine)
    backend = Containers(tmp_path / "jobs", resubmit=True)
    assert backend.submit(JOB).status == RUNNING
    assert (base / "output-1/failure").read_text() == "photo.jpg is broken"
    assert ended(backend).reason.startswith("exit code 1: training 1/2")


def test_another_users_output_is_renamed_not_written_to(
        engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image gives `output` to its own user: a host user of another number may not delete in it."""
    base = begun_before(tmp_path, failure="broken")
    real = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.parent == base / "output":
            raise PermissionError(13, "Permission denied", str(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    assert Containers(tmp_path / "jobs", resubmit=True).submit(JOB).status == RUNNING


def test_a_folder_that_cannot_be_used_is_a_sentence(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("in the way")
    with pytest.raises(UserError, match=r"jobs/job cannot be used .*: give it to yourself, or type"):
        Containers(tmp_path / "jobs").submit(JOB)


def test_a_result_that_is_no_json_is_a_failure_with_a_reason(engine: Path, tmp_path: Path) -> None:
    begun_before(tmp_path, result="{")
    seen = Containers(tmp_path / "jobs").submit(JOB)
    assert "result.json cannot be read" in seen.result["problem"]


def test_stopping_is_true_about_what_the_engine_says(
        engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun_before(tmp_path)
    backend = Containers(tmp_path / "jobs")
    assert not backend.stop(JOB), "there is no such container"
    (engine / "alive").touch()
    assert backend.stop(JOB)
    (engine / "alive").unlink()
    assert backend.look(JOB).status == STOPPED
    (engine / "down").touch()
    with pytest.raises(UserError, match=r"docker does not stop job \(Cannot connect to the daemon\)"):
        backend.stop(JOB)


def test_nobody_waits_for_a_container_that_saves(
        engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_backend, "REFUSES", 0.2)
    (engine / "alive").touch()
    (engine / "slow").touch()
    begin = time.monotonic()
    assert Containers(tmp_path / "jobs").stop(JOB)
    assert time.monotonic() - begin < 3


def test_a_container_gets_the_login_without_its_value_in_the_command(
        engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in docker_backend.LOGIN:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    backend = Containers(tmp_path / "jobs")
    backend.submit(JOB)
    ended(backend)
    [typed] = [line for line in (engine / "calls").read_text().splitlines() if line.startswith("run ")]
    assert "--env AWS_SECRET_ACCESS_KEY --env DREAMBOOTH_SWEEP=mine" in typed
    assert "AWS_ACCESS_KEY_ID" not in typed
    assert "hidden" not in typed


def test_jobs_do_not_share_a_card(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(engine))
    backend = Containers(tmp_path / "jobs")
    assert backend.at_once(4) == 4
    (engine / "nvidia-smi").touch(0o755)
    assert backend.at_once(4) == 1


def test_several_hosts_are_refused_with_all_else(engine: Path, tmp_path: Path) -> None:
    assert Containers(tmp_path).problems({"ResourceConfig": {"InstanceCount": 2}}) == [
        "mode=docker runs one host: type hydra.launcher.instance_count=1"]
