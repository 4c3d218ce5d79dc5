"""`python -m dreambooth.entrypoint` under a folder laid out as SageMaker does: what it leaves, says and ends with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from dreambooth import entrypoint
from dreambooth.container.cluster import Cluster
from dreambooth.container.sagemaker_paths import Places
from dreambooth.container.supervisor import PASSED_ON, End, Supervisor, _deliver
from dreambooth.errors import Interrupted
from tests.support.configs import BLOG
from tests.support.s3_server import plain, serving
from tests.support.sagemaker_job import ASSETS, SHORT, failure, lay_out, steps, weights

PHOTOS = sorted((ASSETS / "demo").glob("*.png"))
SLEEPY = "import time; print('up', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A Supervisor takes the signals of its process, which here is the tests' own."""
    before = {number: signal.getsignal(number) for number in PASSED_ON}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(base: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dreambooth.entrypoint", *words], cwd=base, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {
            "SAGEMAKER_BASE_DIR": str(base), "PYTHONPATH": str(Path(__file__).parents[2]), **environment})


def ended(job: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    told, _ = job.communicate(timeout=timeout)
    return job.returncode, told


def wait_for(base: Path, step: int, job: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 240
    while steps(base) < step:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.2)


# -- jobs that end before they train ---------------------------------------------------------------------------------

def test_the_blogs_job_on_a_cpu_ends_in_one_sentence(tmp_path: Path) -> None:
    lay_out(tmp_path, BLOG | {"manul_upload_model_path": ""})
    code, told = ended(start(tmp_path))
    assert code == 1, told
    assert failure(tmp_path) == "hardware=g4dn needs a CUDA GPU and this machine has none: type hardware=cpu"
    assert f"dreambooth: {failure(tmp_path)}\n" in told
    assert "Traceback" not in told


def test_a_wrong_hyperparameter_ends_before_anything_is_loaded(tmp_path: Path) -> None:
    lay_out(tmp_path, BLOG | {"use_ema": "maybe"})
    code, told = ended(start(tmp_path))
    assert (code, failure(tmp_path)) == (1, "use_ema must be true or false, not 'maybe'"), told
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("asked, photos", [
    ({}, len(PHOTOS)), ({"dataset": "demo", "dataset.allow_drawings": "true"}, len(PHOTOS)),
    ({"instance_data_dir": "s3://bucket/photos"}, 3)], ids=["folder", "demo", "S3"])
def test_epochs_are_counted_in_steps(asked: dict[str, str], photos: int, tmp_path: Path) -> None:
    """One photo a step: every second pass. It ends for want of a GPU, which is looked for after all that is wrong."""
    with serving():
        plain().create_bucket(Bucket="bucket")
        for photo in PHOTOS[:3]:
            plain().upload_file(str(photo), "bucket", f"photos/{photo.name}")
        lay_out(tmp_path, BLOG | {"save_use_epochs": "true", "save_steps": "2", **asked})
        if "instance_data_dir" in asked:
            (tmp_path / "input/config/inputdataconfig.json").write_text("{}", "utf-8")
            shutil.rmtree(tmp_path / "input/data")
        code, told = ended(start(tmp_path))
    assert f" checkpoint.every={2 * photos} " in told, told
    assert (code, failure(tmp_path)) == (1, "hardware=g4dn needs a CUDA GPU and this machine has none: type "
                                            "hardware=cpu")


# -- the process that stands between ---------------------------------------------------------------------------------

def test_a_killed_process_is_told_of() -> None:
    end = Supervisor().run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {})
    assert end.code == 137
    assert "host memory ran out" in end.sentence


def test_an_exit_code_is_passed_on() -> None:
    assert Supervisor().run([sys.executable, "-c", "raise SystemExit(4)"], {}).code == 4
    assert Supervisor().run([sys.executable, "-c", ""], {}) == End(0, "")


def test_a_child_that_an_asked_for_signal_ends_is_interrupted_not_killed(tmp_path: Path) -> None:
    """It had no time to install a handler: nothing is lost, and it may be started again."""
    supervisor = Supervisor()
    supervisor._ask(signal.SIGTERM, None)
    assert supervisor._end(-signal.SIGTERM, tmp_path).code == Interrupted.exit_code
    assert supervisor._end(-signal.SIGKILL, tmp_path).code == 128 + signal.SIGKILL


@pytest.mark.parametrize("launcher, told", [(True, "worker"), (False, "launcher")])
def test_the_processes_of_a_launcher_are_signalled_in_its_place(launcher: bool, told: str, tmp_path: Path) -> None:
    worker = ("import pathlib, signal, sys, time\n"
              "def say(*_): pathlib.Path(sys.argv[1], sys.argv[2]).touch(); sys.exit()\n"
              "signal.signal(signal.SIGTERM, say); pathlib.Path(sys.argv[1], sys.argv[2] + '-ready').touch()\n")
    start = "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', sys.argv[3], sys.argv[1], 'worker'])\n"
    parent = subprocess.Popen([sys.executable, "-c", worker + start + "child.wait()", str(tmp_path), "launcher",
                               worker + "time.sleep(60)"])
    workers: list[psutil.Process] = []
    try:
        while not (tmp_path / "worker-ready").exists():
            time.sleep(0.02)
        workers = psutil.Process(parent.pid).children()
        _deliver(parent.pid, signal.SIGTERM, launcher)
        parent.wait(30)
        assert {path.name for path in tmp_path.iterdir() if "ready" not in path.name} == {told}
    finally:
        for process in workers:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_signal_before_the_child_is_not_lost() -> None:
    supervisor = Supervisor()
    os.kill(os.getpid(), signal.SIGTERM)
    assert supervisor.run([sys.executable, "-c", SLEEPY], {}).code == Interrupted.exit_code


def test_the_sentence_of_the_process_that_meant_it_is_kept(tmp_path: Path) -> None:
    for rank, meant in ((0, False), (1, True)):
        end = {"rank": rank, "code": 1 + rank, "sentence": f"rank {rank}", "meant": meant}
        (tmp_path / f"{rank}.json").write_text(json.dumps(end), encoding="utf-8")
    assert Supervisor()._end(1, tmp_path) == End(2, "rank 1")


def test_a_killed_process_of_a_launcher_is_told_of_and_not_what_it_did_to_the_others(tmp_path: Path) -> None:
    """Rank 1 runs out of memory; rank 0 is ended by the launcher, and says that it saved."""
    (tmp_path / "worker.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "folder = pathlib.Path(os.environ['DREAMBOOTH_ENDS'])\n"
        "def say(*_):\n"
        "    text = '{\"rank\": 0, \"code\": 5, \"sentence\": \"saved\", \"meant\": true}'\n"
        "    (folder / '0.json').write_text(text); os._exit(5)\n"
        "if os.environ['RANK'] == '0':\n"
        "    signal.signal(signal.SIGTERM, say); (folder / 'ready').touch(); time.sleep(60)\n"
        "while not (folder / 'ready').exists(): time.sleep(0.02)\n"
        "os.kill(os.getpid(), 9)\n", "utf-8")
    command = Cluster(processes=2).command([])
    end = Supervisor().run([*command[:command.index("-m", 3)], str(tmp_path / "worker.py")], {}, launcher=True)
    assert end.code == 137
    assert "host memory ran out" in end.sentence


@pytest.mark.parametrize("codes, ended", [
    ([(1, 0), (-9, 0)], -9),  # its neighbour noticed before the launcher did
    ([(4, 0), (-9, 110)], 4),  # the launcher killed who did not end
    ([(3, 0), (-15, 0)], 3), ([(-15, 0), (-9, 1)], -9), ([(-11, 0), (1, 0)], -11), ([(-15, 0), (-15, 0)], -15)])
def test_a_launcher_ends_as_the_process_that_took_the_others_along(codes: list[tuple[int, int]], ended: int) -> None:
    from dreambooth.container.torchrun import first

    assert first([SimpleNamespace(exitcode=code, timestamp=second) for code, second in codes]) == ended


@pytest.mark.parametrize("stage", ["published", "sent"])
def test_a_signal_after_the_last_step_says_where_the_model_is(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is put in place, or while a copy of it is sent."""
    lay_out(tmp_path, SHORT | {"manul_upload_model_path": "s3://bucket/models"})
    supervisor, places = Supervisor(), Places(tmp_path)
    real = subprocess.Popen

    def child(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        train = "dreambooth.train" in command
        return real([sys.executable, "-c", "" if train else f"import os; os.kill({os.getpid()}, 15); {SLEEPY}"],
                    **options)

    monkeypatch.setattr(subprocess, "Popen", child)
    monkeypatch.setattr(entrypoint, "publish",
                        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if stage == "published" else None)
    end = entrypoint._job(places, [], supervisor)
    assert end.code == Interrupted.exit_code
    assert end.sentence.startswith(f"SIGTERM: stopped after the last step, the model is in {places.model}; start it ")


# -- jobs that train -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_blogs_job_trains_with_three_overrides(tmp_path: Path) -> None:
    lay_out(tmp_path, BLOG | {"manul_upload_model_path": "", "hardware": "cpu", "model": "tiny",
                              "save_use_epochs": "true", "save_steps": "1", "train.max_train_steps": "7"})
    code, told = ended(start(tmp_path))
    assert code == 0, told
    assert json.loads((tmp_path / "model/result.json").read_text("utf-8"))["step"] == 7
    saved = {path.name for path in tmp_path.glob("checkpoints/*/checkpoints/step-*")}
    assert saved == {f"step-{step:06d}" for step in (len(PHOTOS), 7)}
    assert (tmp_path / "model/contact_sheet.png").is_file()
    assert (tmp_path / "model/model/model_index.json").is_file()
    assert [path.name for path in (tmp_path / "checkpoints").glob("aws-trained-dreambooth-model-*")]
    assert not (tmp_path / "output/failure").exists()


@pytest.mark.slow
def test_sigterm_saves_and_the_same_job_goes_on_bit_for_bit(tmp_path: Path) -> None:
    base, straight = tmp_path / "ml", tmp_path / "straight"  # one place: class images are those of a base model there
    lay_out(base, SHORT | {"train.max_train_steps": "30"})
    code, told = ended(start(base))
    assert code == 0, told
    base.rename(straight)
    lay_out(base, SHORT | {"train.max_train_steps": "30"})
    job = start(base)
    wait_for(base, 3, job)
    job.send_signal(signal.SIGTERM)
    code, told = ended(job, 120)
    assert code == Interrupted.exit_code, told
    assert "SIGTERM: stopped and saved after step" in failure(base)
    code, told = ended(start(base))
    assert code == 0, told
    assert "going on after step" in told
    resumed, uninterrupted = weights(base), weights(straight)
    assert resumed and resumed.keys() == uninterrupted.keys()
    assert {name for name in resumed if resumed[name] != uninterrupted[name]} == set()
    assert not (base / "output/failure").exists()


@pytest.mark.slow
def test_two_hosts_train_data_parallel_stop_together_and_the_first_keeps_the_result(tmp_path: Path) -> None:
    hosts = ("127.0.0.1", "localhost")
    bases = [tmp_path / host for host in hosts]
    for base, host in zip(bases, hosts, strict=True):
        lay_out(base, SHORT | {"train.max_train_steps": "30", "checkpoint.every": "null"}, host=host, hosts=hosts)
    jobs = [start(base, MASTER_PORT="29671") for base in bases]
    wait_for(bases[0], 3, jobs[0])
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    ends = [ended(job, 120) for job in jobs]
    assert [code for code, _ in ends] == [Interrupted.exit_code] * 2, ends
    assert "stopped and saved after step" in failure(bases[0])
    [saved] = bases[0].glob("checkpoints/*/checkpoints/step-*")
    other = bases[1] / saved.parent.relative_to(bases[0])
    other.mkdir(parents=True, exist_ok=True)  # SageMaker gives every host what is in S3
    saved_there = other / saved.name
    subprocess.run(["cp", "-r", saved, saved_there], check=True)
    ends = [ended(job) for job in [start(base, MASTER_PORT="29672") for base in bases]]
    assert [code for code, _ in ends] == [0, 0], ends
    assert (bases[0] / "model/result.json").is_file()
    assert not (bases[1] / "model/result.json").exists()


@pytest.mark.slow
def test_two_processes_of_a_host_are_stopped_once_and_both_have_saved(tmp_path: Path) -> None:
    """PyTorch's launcher would pass SIGTERM on as well, and a second one does not wait for the checkpoint."""
    lay_out(tmp_path, SHORT | {"hardware": "local", "train.max_train_steps": "200", "checkpoint.every": "null"})
    job = start(tmp_path, SM_NUM_GPUS="2", CUDA_VISIBLE_DEVICES="")
    wait_for(tmp_path, 3, job)
    job.send_signal(signal.SIGTERM)
    code, told = ended(job, 120)
    assert code == Interrupted.exit_code, told
    assert "SIGTERM: stopped and saved after step" in failure(tmp_path)
    assert "ChildFailedError" not in told
    assert len(list(tmp_path.glob("checkpoints/*/checkpoints/step-*/state.json"))) == 1
