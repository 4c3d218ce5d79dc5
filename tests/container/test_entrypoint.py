"""`python -m dreambooth.entrypoint` in a folder with SageMaker's layout: its files, messages and exit codes."""

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

from dreambooth import cli, entrypoint
from dreambooth.container.cluster import Cluster
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.container.supervisor import FORWARDED_SIGNALS, ExitStatus, Supervisor, _send_signal
from dreambooth.errors import Interrupted, LostProcess, OutOfMemory, UserError
from dreambooth.storage import __main__ as storage_command
from dreambooth.storage import folders
from dreambooth.utils import atomic_files
from tests.support.configs import BLOG
from tests.support.s3_server import plain_client, serving
from tests.support.sagemaker_job import ASSETS, SHORT, failure, lay_out, steps, weights
from tests.support.services import free_port
from tests.support.warm_python import PYTHON

PHOTOS = sorted((ASSETS / "demo").glob("*.png"))
SLEEPY = "import time; print('up', flush=True); time.sleep(600)"
# PyTorch's launcher starts its workers with it. The launcher itself must be the process that the supervisor started.
FORKED_WORKERS = {"PYTHON_EXEC": PYTHON}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restore the signal handlers that a Supervisor installs in the test process."""
    before = {number: signal.getsignal(number) for number in FORWARDED_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(base: Path, python: str = PYTHON, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-m", "dreambooth.entrypoint"], cwd=base, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {
            "SAGEMAKER_BASE_DIR": str(base), "PYTHONPATH": str(Path(__file__).parents[2]), **environment})


def wait(job: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and the output."""
    output, _ = job.communicate(timeout=900)
    return job.returncode, output


def wait_for(base: Path, step: int, job: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 900
    while steps(base) < step:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


# -- jobs that end before they train ---------------------------------------------------------------------------------

def test_the_blogs_job_on_a_cpu_fails_with_one_sentence(tmp_path: Path) -> None:
    lay_out(tmp_path, BLOG | {"manul_upload_model_path": ""})
    code, output = wait(start(tmp_path))
    assert code == 1, output
    assert failure(tmp_path) == "hardware=g4dn needs a CUDA GPU and this machine has none: type hardware=cpu"
    assert f"dreambooth: {failure(tmp_path)}\n" in output
    assert "Traceback" not in output


def test_a_wrong_hyperparameter_fails_before_anything_is_loaded(tmp_path: Path) -> None:
    lay_out(tmp_path, BLOG | {"use_ema": "maybe"})
    code, output = wait(start(tmp_path))
    assert (code, failure(tmp_path)) == (1, "use_ema must be true or false, not 'maybe'"), output
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("hyperparameters, photos", [
    ({}, len(PHOTOS)), ({"dataset": "demo", "dataset.allow_drawings": "true"}, len(PHOTOS)),
    ({"instance_data_dir": "s3://bucket/photos"}, 3)], ids=["folder", "demo", "S3"])
def test_save_use_epochs_is_converted_to_steps(hyperparameters: dict[str, str], photos: int, tmp_path: Path) -> None:
    """One photo per step, saved every second epoch. The job fails because it has no GPU, which is checked last."""
    with serving():
        plain_client().create_bucket(Bucket="bucket")
        for photo in PHOTOS[:3]:
            plain_client().upload_file(str(photo), "bucket", f"photos/{photo.name}")
        lay_out(tmp_path, BLOG | {"save_use_epochs": "true", "save_steps": "2", **hyperparameters})
        if "instance_data_dir" in hyperparameters:
            (tmp_path / "input/config/inputdataconfig.json").write_text("{}", "utf-8")
            shutil.rmtree(tmp_path / "input/data")
        code, output = wait(start(tmp_path))
    assert f" checkpoint.every={2 * photos} " in output, output
    assert (code, failure(tmp_path)) == (1, "hardware=g4dn needs a CUDA GPU and this machine has none: type "
                                            "hardware=cpu")


# -- the supervisor ---------------------------------------------------------------------------------------------------

def test_a_killed_process_is_reported() -> None:
    status = Supervisor().run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {})
    assert status.code == 137
    assert "host memory ran out" in status.message


def test_an_exit_code_is_passed_on() -> None:
    assert Supervisor().run([sys.executable, "-c", "raise SystemExit(4)"], {}).code == 4
    assert Supervisor().run([sys.executable, "-c", ""], {}) == ExitStatus(0, "")


def test_a_child_ended_by_a_forwarded_signal_counts_as_interrupted(tmp_path: Path) -> None:
    """It had not installed a handler yet: nothing is lost, and the job may be started again."""
    supervisor = Supervisor()
    supervisor._record_signal(signal.SIGTERM, None)
    assert supervisor._exit_status(-signal.SIGTERM, tmp_path).code == Interrupted.exit_code
    assert supervisor._exit_status(-signal.SIGKILL, tmp_path).code == 128 + signal.SIGKILL


@pytest.mark.parametrize("launcher, receiver", [(True, "worker"), (False, "launcher")])
def test_signals_go_to_the_launchers_processes_and_not_to_the_launcher(
    launcher: bool, receiver: str, tmp_path: Path
) -> None:
    worker = ("import pathlib, signal, sys, time\n"
              "def report(*_): pathlib.Path(sys.argv[1], sys.argv[2]).touch(); sys.exit()\n"
              "signal.signal(signal.SIGTERM, report); pathlib.Path(sys.argv[1], sys.argv[2] + '-ready').touch()\n")
    start = "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', sys.argv[3], sys.argv[1], 'worker'])\n"
    parent = subprocess.Popen([sys.executable, "-c", worker + start + "child.wait()", str(tmp_path), "launcher",
                               worker + "time.sleep(600)"])
    workers: list[psutil.Process] = []
    try:
        while not (tmp_path / "worker-ready").exists():
            time.sleep(0.02)
        workers = psutil.Process(parent.pid).children()
        _send_signal(parent.pid, signal.SIGTERM, launcher)
        parent.wait(600)
        assert {path.name for path in tmp_path.iterdir() if "ready" not in path.name} == {receiver}
    finally:
        for process in workers:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_signal_before_the_child_starts_is_not_lost() -> None:
    supervisor = Supervisor()
    os.kill(os.getpid(), signal.SIGTERM)
    assert supervisor.run([sys.executable, "-c", SLEEPY], {}).code == Interrupted.exit_code


def test_a_user_error_is_reported_before_internal_errors_of_other_ranks(tmp_path: Path) -> None:
    for rank, meant in ((0, False), (1, True)):
        report = {"rank": rank, "code": 1 + rank, "sentence": f"rank {rank}", "meant": meant}
        (tmp_path / f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    assert Supervisor()._exit_status(1, tmp_path) == ExitStatus(2, "rank 1")


def test_the_reason_of_a_lost_process_is_reported_before_its_loss(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMBOOTH_ENDS", str(tmp_path))
    monkeypatch.setattr(cli, "_exit_codes", [])
    monkeypatch.setattr(cli, "_last_failure", [])
    for rank, error in enumerate((LostProcess("another process has ended"), OutOfMemory("memory ran out"))):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(cli, "_mask_hydra_record", lambda: None)
        cli.run_job(lambda error=error: (_ for _ in ()).throw(error), False)
    assert Supervisor()._exit_status(1, tmp_path) == ExitStatus(4, "memory ran out")


def test_an_exit_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, a process may be killed while it writes its report, and the disk may be full."""
    monkeypatch.setenv("DREAMBOOTH_ENDS", str(tmp_path))
    monkeypatch.setattr(cli, "_exit_codes", [])
    cli._record_failure(3, "it does not fit")
    assert Supervisor()._exit_status(1, tmp_path) == ExitStatus(3, "it does not fit")
    whole = (tmp_path / "0.json").read_text("utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        cli._record_failure(4, "out of memory")
    assert {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()} == {"0.json": whole}
    (tmp_path / ".writing-1234-1.json").write_text(whole, "utf-8")  # of a process that was killed
    for broken in ('{"rank": 0, "co', "", "[1]", '{"rank": 0}'):
        (tmp_path / "0.json").write_text(broken, "utf-8")
        assert Supervisor()._exit_status(1, tmp_path) == ExitStatus(1, "the job ended with exit code 1: see its log "
                                                                       "for the reason")


def test_a_killed_rank_is_reported_and_not_the_failures_that_it_caused(tmp_path: Path) -> None:
    """Rank 1 runs out of memory; the launcher ends rank 0, which reports that it has saved."""
    (tmp_path / "worker.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "folder = pathlib.Path(os.environ['DREAMBOOTH_ENDS'])\n"
        "def report(*_):\n"
        "    text = '{\"rank\": 0, \"code\": 5, \"sentence\": \"saved\", \"meant\": true}'\n"
        "    (folder / '0.json').write_text(text); os._exit(5)\n"
        "if os.environ['RANK'] == '0':\n"
        "    signal.signal(signal.SIGTERM, report); (folder / 'ready').touch(); time.sleep(600)\n"
        "while not (folder / 'ready').exists(): time.sleep(0.02)\n"
        "os.kill(os.getpid(), 9)\n", "utf-8")
    command = Cluster(processes_per_host=2).train_command([])
    status = Supervisor().run([*command[:command.index("-m", 3)], str(tmp_path / "worker.py")], {}, launcher=True)
    assert status.code == 137
    assert "host memory ran out" in status.message


@pytest.mark.parametrize("codes, exit_code", [
    ([(1, 0), (-9, 0)], -9),  # the other rank failed before the launcher noticed the killed one
    ([(4, 0), (-9, 110)], 4),  # the launcher killed a rank that did not end
    ([(3, 0), (-15, 0)], 3), ([(-15, 0), (-9, 1)], -9), ([(-11, 0), (1, 0)], -11), ([(-15, 0), (-15, 0)], -15)])
def test_the_launcher_exits_with_the_code_of_the_rank_that_failed_first(
    codes: list[tuple[int, int]], exit_code: int
) -> None:
    from dreambooth.container.torchrun import root_exit_code

    assert root_exit_code([SimpleNamespace(exitcode=code, timestamp=second) for code, second in codes]) == exit_code


@pytest.mark.parametrize("chosen", [None, "0"])
def test_the_launcher_opens_a_new_store_for_each_start_unless_the_user_has_chosen(
        chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.container.torchrun import use_new_stores

    key = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    monkeypatch.setattr(os, "environ", {} if chosen is None else {key: chosen})
    use_new_stores()
    assert os.environ[key] == (chosen or "1")


@pytest.mark.parametrize("stage", ["publish", "upload"])
def test_a_signal_after_the_last_step_says_where_the_model_is(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is published, or while a copy of it is uploaded."""
    lay_out(tmp_path, SHORT | {"manul_upload_model_path": "s3://bucket/models"})
    supervisor, paths = Supervisor(), SageMakerPaths(tmp_path)
    original = subprocess.Popen

    def start_child(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        train = "dreambooth.train" in command
        return original([sys.executable, "-c", "" if train else f"import os; os.kill({os.getpid()}, 15); {SLEEPY}"],
                    **options)

    def publish(run_dir: Path, target: Path) -> None:
        (target / "result.json").write_text('{"step": 7}', "utf-8")
        if stage == "publish":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", start_child)
    monkeypatch.setattr(entrypoint, "publish", publish)
    monkeypatch.setattr(folders, "check_destination", lambda uri: None)
    status = entrypoint._run_job(paths, [], supervisor)
    assert status.code == Interrupted.exit_code
    assert status.message.startswith(f"SIGTERM: stopped after the last step, the model is in {paths.model}; start it ")


# -- the copy of the model in S3 --------------------------------------------------------------------------------------

def run_with_upload(base: Path, monkeypatch: pytest.MonkeyPatch, step: int = 7, seconds: int = 1) -> list[list[str]]:
    """Run the blog's job with a training that only writes a result, and return the commands that were started."""
    lay_out(base, SHORT | {"manul_upload_model_path": "s3://bucket/models", "model_name": "toy"})
    commands: list[list[str]] = []

    def run(self: Supervisor, command: list[str], environment: dict[str, str], **options: Any) -> ExitStatus:
        commands.append(command)
        if "dreambooth.storage" in command:
            storage_command.upload(storage_command.parser().parse_args(command[3:]))
        return ExitStatus()

    def publish(run_dir: Path, target: Path) -> None:
        (target / "model").mkdir(exist_ok=True)
        (target / "model/weights.safetensors").write_text(str(step))
        (target / "result.json").write_text(json.dumps({"step": step, "seconds": seconds}), "utf-8")

    monkeypatch.setattr(Supervisor, "run", run)
    monkeypatch.setattr(entrypoint, "publish", publish)
    assert entrypoint._run_job(SageMakerPaths(base), [], Supervisor()) == ExitStatus()
    return commands


def test_a_second_job_of_the_same_name_and_an_extended_one_are_uploaded(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """result.json holds the seconds of the training, which differ in every job."""
    with serving():
        plain_client().create_bucket(Bucket="bucket")
        for number, steps_of_job in enumerate((7, 7, 12)):
            run_with_upload(tmp_path, monkeypatch, steps_of_job, seconds=number)
        keys = {item["Key"] for item in plain_client().list_objects_v2(Bucket="bucket")["Contents"]}
    [run] = {"/".join(key.split("/")[:2]) for key in keys}
    assert run.startswith("models/toy-")
    assert {key for key in keys if key.endswith("result.json")} == {
        f"{run}/result-{step}/result.json" for step in ("000007", "000012")}


def test_an_upload_address_that_s3_refuses_ends_the_job_before_it_trains(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving():
        commands: list[list[str]] = []
        monkeypatch.setattr(Supervisor, "run", lambda self, command, *_, **__: commands.append(command))
        lay_out(tmp_path, SHORT | {"manul_upload_model_path": "s3://nowhere/models"})
        with pytest.raises(UserError, match="bucket nowhere does not exist"):
            entrypoint._run_job(SageMakerPaths(tmp_path), [], Supervisor())
    assert commands == []


# -- jobs that train -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_blogs_job_trains_with_three_overrides(tmp_path: Path) -> None:
    lay_out(tmp_path, BLOG | {"manul_upload_model_path": "", "hardware": "cpu", "model": "tiny",
                              "save_use_epochs": "true", "save_steps": "1", "train.max_train_steps": "7",
                              "num_class_images": "4", "prior.num_inference_steps": "1",
                              "sample.num_inference_steps": "1", "evaluate.encoder": "none"})
    code, output = wait(start(tmp_path))
    assert code == 0, output
    assert json.loads((tmp_path / "model/result.json").read_text("utf-8"))["step"] == 7
    saved = {path.name for path in tmp_path.glob("checkpoints/*/checkpoints/step-*")}
    assert saved == {f"step-{step:06d}" for step in (len(PHOTOS), 7)}
    assert (tmp_path / "model/contact_sheet.png").is_file()
    assert (tmp_path / "model/model/model_index.json").is_file()
    assert [path.name for path in (tmp_path / "checkpoints").glob("aws-trained-dreambooth-model-*")]
    assert not (tmp_path / "output/failure").exists()


@pytest.mark.slow
def test_sigterm_saves_and_the_same_job_resumes_bit_for_bit(tmp_path: Path) -> None:
    base, uninterrupted_base = tmp_path / "ml", tmp_path / "uninterrupted"
    # Both jobs run in the same folder, because class images depend on the path of the base model.
    lay_out(base, SHORT | {"train.max_train_steps": "30"})
    code, output = wait(start(base))
    assert code == 0, output
    base.rename(uninterrupted_base)
    lay_out(base, SHORT | {"train.max_train_steps": "30"})
    job = start(base)
    wait_for(base, 3, job)
    job.send_signal(signal.SIGTERM)
    code, output = wait(job)
    assert code == Interrupted.exit_code, output
    assert "SIGTERM: stopped and saved after step" in failure(base)
    code, output = wait(start(base))
    assert code == 0, output
    assert "resuming after step" in output
    resumed, uninterrupted = weights(base), weights(uninterrupted_base)
    assert resumed and resumed.keys() == uninterrupted.keys()
    assert {name for name in resumed if resumed[name] != uninterrupted[name]} == set()
    assert not (base / "output/failure").exists()


@pytest.mark.slow
def test_two_hosts_train_data_parallel_stop_together_and_the_first_publishes(tmp_path: Path) -> None:
    hosts = ("127.0.0.1", "localhost")
    bases = [tmp_path / host for host in hosts]
    settings = SHORT | {"checkpoint.every": "null", "prior.with_prior_preservation": "false"}
    for base, host in zip(bases, hosts, strict=True):
        lay_out(base, settings | {"train.max_train_steps": "1000"}, host=host, hosts=hosts)
    port = str(free_port())
    jobs = [start(base, sys.executable, MASTER_PORT=port, **FORKED_WORKERS) for base in bases]
    wait_for(bases[0], 3, jobs[0])
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    results = [wait(job) for job in jobs]
    assert [code for code, _ in results] == [Interrupted.exit_code] * 2, results
    assert "stopped and saved after step" in failure(bases[0])
    [saved] = bases[0].glob("checkpoints/*/checkpoints/step-*")
    other = bases[1] / saved.parent.relative_to(bases[0])
    other.mkdir(parents=True, exist_ok=True)  # SageMaker restores the checkpoints in S3 on every host
    subprocess.run(["cp", "-r", saved, other / saved.name], check=True)
    for base, host in zip(bases, hosts, strict=True):
        step = int(saved.name.removeprefix("step-"))
        lay_out(base, settings | {"train.max_train_steps": str(step + 1)}, host=host, hosts=hosts)
    port = str(free_port())
    jobs = [start(base, sys.executable, MASTER_PORT=port, **FORKED_WORKERS) for base in bases]
    results = [wait(job) for job in jobs]
    assert [code for code, _ in results] == [0, 0], results
    assert (bases[0] / "model/result.json").is_file()
    assert not (bases[1] / "model/result.json").exists()


@pytest.mark.slow
def test_two_processes_of_a_host_get_sigterm_once_and_both_save(tmp_path: Path) -> None:
    """PyTorch's launcher would forward SIGTERM as well, and a process does not save after a second one."""
    lay_out(tmp_path, SHORT | {"hardware": "local", "train.max_train_steps": "1000", "checkpoint.every": "null",
                               "prior.with_prior_preservation": "false"})
    job = start(tmp_path, sys.executable, SM_NUM_GPUS="2", CUDA_VISIBLE_DEVICES="", **FORKED_WORKERS)
    wait_for(tmp_path, 3, job)
    job.send_signal(signal.SIGTERM)
    code, output = wait(job)
    assert code == Interrupted.exit_code, output
    assert "SIGTERM: stopped and saved after step" in failure(tmp_path)
    assert "ChildFailedError" not in output
    assert len(list(tmp_path.glob("checkpoints/*/checkpoints/step-*/state.json"))) == 1
