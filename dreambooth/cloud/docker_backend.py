"""Backend that runs jobs in local containers, with the image, folders and environment variables of SageMaker jobs."""

import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Job, JobState, Unreachable
from dreambooth.cloud.training_job_request import METRICS, REPORTED
from dreambooth.config.storage import is_remote
from dreambooth.errors import UserError
from dreambooth.storage import folders

FOLDERS = ("input/config", "input/data", "model", "checkpoints", "output")
STOP_TIMEOUT = 120  # seconds between SIGTERM and SIGKILL, as on SageMaker
STOP_REPLY_TIMEOUT = 3.0  # seconds to wait for an error message of `docker stop`
# Environment variables that are passed to the container by name only, so that no value appears in a command line.
CREDENTIAL_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION",
                        "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HF_TOKEN")


class DockerBackend:
    """A Backend that runs containers on this machine.

    Args:
        root: folder that contains one folder per job. The job's folder has the job's name and is mounted as /opt/ml.
        engine: program that runs containers: docker, or a program with the same command-line options.
        resubmit: whether to run a job again if an earlier attempt failed.
    """

    def __init__(self, root: Path, engine: str = "docker", resubmit: bool = False) -> None:
        self._root, self._engine, self._resubmit = root, engine, resubmit
        self._processes: dict[str, tuple[subprocess.Popen[bytes], float]] = {}  # name -> process, start time
        self._stopped: set[str] = set()

    def find_problems(self, request: dict[str, Any]) -> list[str]:
        """Return the reasons why a job cannot run on this machine, one sentence per reason."""
        problems = []
        if shutil.which(self._engine) is None:
            problems.append(f"{self._engine} is not installed on this machine: install it, or type "
                            "hydra.launcher.mode=local")
        if request.get("ResourceConfig", {}).get("InstanceCount", 1) != 1:
            problems.append("mode=docker runs one host: type hydra.launcher.instance_count=1")
        return problems

    def limit_parallel(self, max_parallel: int) -> int:
        """Return how many jobs may run at the same time.

        On a machine with GPUs, the result is 1, because each job uses all GPUs. Otherwise it is `max_parallel`.
        """
        return 1 if _gpu_options() else max_parallel

    def submit(self, job: Job) -> JobState:
        folder = self._root / job.name
        if (folder / "model/result.json").is_file():
            return self.poll(job)
        if self._is_running(job):  # started by an earlier command
            return JobState(RUNNING, "Training")
        if (folder / "log.txt").is_file() and not self._resubmit:
            state = self.poll(job)
            state.reason += "; hydra.launcher.resubmit=true runs it again"
            return state
        try:
            self._start(job, folder)
        except OSError as error:
            raise UserError(f"{folder} cannot be used ({error}): make yourself its owner, or type another "
                            "hydra.launcher.sweep=NAME") from error
        return JobState(RUNNING, "Training")

    def _start(self, job: Job, folder: Path) -> None:
        _rename_if_not_empty(folder / "output")  # an earlier attempt's files belong to the container's user
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        mounts = [f"{folder.absolute()}:/opt/ml"]
        for channel in job.request.get("InputDataConfig", ()):
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"].rstrip("/")
            source = folders.download(uri, self._root / "s3") if is_remote(uri) else Path(uri)
            mounts.append(f"{source.absolute()}:/opt/ml/input/data/{channel['ChannelName']}:ro")
        for name, content in _config_files(job).items():
            (folder / "input/config" / name).write_text(json.dumps(content), encoding="utf-8")
        command = [self._engine, "run", "--rm", "--name", job.name, *_gpu_options(),
                   *network_options(job.request["Environment"])]
        for mount in mounts:
            command += ["--volume", mount]
        for key in CREDENTIAL_VARIABLES:
            command += ["--env", key] if key in os.environ else []
        for key, value in {**job.request["Environment"], "TRAINING_JOB_NAME": job.name}.items():
            command += ["--env", f"{key}={value}"]
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen([*command, job.request["AlgorithmSpecification"]["TrainingImage"], "train"],
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._processes[job.name] = process, time.monotonic()

    def poll(self, job: Job) -> JobState:
        folder, entry = self._root / job.name, self._processes.get(job.name)
        code = entry[0].poll() if entry else None
        seconds = time.monotonic() - entry[1] if entry else 0.0
        log_file = folder / "log.txt"
        log = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
        values = {name: re.findall(regex, log) for name, regex in (METRICS | REPORTED).items()}
        reported = list(zip(map(int, values["reported_step"]), map(float, values["reported_value"]), strict=False))
        state = JobState(RUNNING, "Training", step=int(values["step"][-1]) if values["step"] else None,
                         loss=float(values["loss"][-1]) if values["loss"] else None, seconds=seconds,
                         reported=reported[-1] if reported else None)
        if (code is None) if entry else self._is_running(job):
            return state
        state.billed_seconds = seconds
        failure, result = folder / "output/failure", folder / "model/result.json"
        if not code and result.is_file():
            state.status, state.result = COMPLETED, _read_result(result)
        elif job.name in self._stopped:
            state.status, state.reason = STOPPED, "it was stopped"
        else:
            message = failure.read_text(encoding="utf-8") if failure.is_file() else log[-300:]
            end = "it ended without a result" if code is None else f"exit code {code}"
            state.status, state.reason = FAILED, " ".join(f"{end}: {message}".split())[:1024]
        state.detail = state.status
        return state

    def stop(self, job: Job) -> bool:
        """Send a job the signal to save and stop, and do not wait until the job has ended.

        Return False if the job is not running.

        Raises:
            UserError: the engine cannot stop the job.
        """
        self._stopped.add(job.name)
        process = subprocess.Popen(
            [self._engine, "stop", "--time", str(STOP_TIMEOUT), job.name], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            message = process.communicate(timeout=STOP_REPLY_TIMEOUT)[1]
        except subprocess.TimeoutExpired:  # the engine is still waiting while the job saves its state
            return True
        if process.returncode and not _is_no_such_container(message):
            raise UserError(f"{self._engine} does not stop {job.name} ({' '.join(message.split())[:300]})")
        return not process.returncode

    def stop_command(self, job: Job) -> str:
        return f"{self._engine} stop --time {STOP_TIMEOUT} {job.name}"

    def _is_running(self, job: Job) -> bool:
        """Return whether the container of a job is running. The container may have been started by another command."""
        inspect = subprocess.run([self._engine, "container", "inspect", "--format", "{{.State.Running}}", job.name],
                                 capture_output=True, text=True, check=False)
        if inspect.returncode and not _is_no_such_container(inspect.stderr):
            raise Unreachable(f"{self._engine} does not answer ({' '.join(inspect.stderr.split())[:300]})")
        return inspect.stdout.strip() == "true"


def network_options(environment: Mapping[str, str]) -> list[str]:
    """Return the engine options for the host's network if a value in `environment` is a URL of localhost, else [].

    A container on the host's network reaches this machine as localhost. A container on its own network does not.
    """
    hosts = {urlsplit(value).hostname for value in environment.values() if "://" in value}
    return ["--network", "host"] if hosts & {"localhost", "127.0.0.1", "::1"} else []


def _gpu_options() -> list[str]:
    return ["--gpus", "all"] if shutil.which("nvidia-smi") else []


def _is_no_such_container(message: str) -> bool:
    return "no such" in message.lower()


def _rename_if_not_empty(folder: Path) -> None:
    """Append a number to the name of a folder that is not empty.

    Renaming a folder, unlike deleting it, requires no permission to change the files in the folder.
    """
    if folder.is_dir() and any(folder.iterdir()):
        names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))


def _read_result(path: Path) -> dict[str, Any]:
    """Return the content of result.json, or {"problem": reason} if the file cannot be read."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"problem": f"{path} cannot be read ({error})"}
    return result


def _config_files(job: Job) -> dict[str, Any]:
    """Return the contents of the files that SageMaker writes into /opt/ml/input/config, by file name."""
    channels = {channel["ChannelName"]: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated",
                                         "RecordWrapperType": "None"}
                for channel in job.request.get("InputDataConfig", ())}
    return {"hyperparameters.json": job.request["HyperParameters"], "inputdataconfig.json": channels,
            "resourceconfig.json": {"current_host": "algo-1", "hosts": ["algo-1"],
                                    "current_instance_type": job.request["ResourceConfig"]["InstanceType"],
                                    "network_interface_name": "eth0"}}
