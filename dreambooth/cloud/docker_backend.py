"""Jobs in containers of this machine, under the contract that SageMaker keeps: the same image, the same folders."""

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

from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Job, Seen, Unreachable
from dreambooth.cloud.training_job_request import METRICS
from dreambooth.errors import UserError
from dreambooth.storage import folders

FOLDERS = ("input/config", "input/data", "model", "checkpoints", "output")
PATIENCE = 120  # seconds between SIGTERM and SIGKILL, as SageMaker has it
REFUSES = 3.0  # seconds in which an engine that cannot stop a container says so
LOGIN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION",
         "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")  # handed on where they are set, by name: no value in a command


class Containers:
    """A Backend.

    Args:
        resubmit: a job that failed before runs again.
    """

    def __init__(self, root: Path, engine: str = "docker", resubmit: bool = False) -> None:
        self._root, self._engine, self._resubmit = root, engine, resubmit
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._stopped: set[str] = set()

    def problems(self, request: dict[str, Any]) -> list[str]:
        """What is missing on this machine."""
        found = []
        if shutil.which(self._engine) is None:
            found.append(f"there is no {self._engine} on this machine: install it, or type hydra.launcher.mode=local")
        if request.get("ResourceConfig", {}).get("InstanceCount", 1) != 1:
            found.append("mode=docker runs one host: type hydra.launcher.instance_count=1")
        return found

    def at_once(self, asked: int) -> int:
        """How many jobs may run: a job takes every card."""
        return 1 if _gpus() else asked

    def submit(self, job: Job) -> Seen:
        base = self._root / job.name
        if (base / "model/result.json").is_file():
            return self.look(job)
        if self._alive(job):  # begun by an earlier command
            return Seen(RUNNING, "Training")
        if (base / "log.txt").is_file() and not self._resubmit:
            seen = self.look(job)
            seen.reason += "; hydra.launcher.resubmit=true begins it again"
            return seen
        try:
            self._begin(job, base)
        except OSError as error:
            raise UserError(f"{base} cannot be used ({error}): give it to yourself, or type another "
                            "hydra.launcher.sweep=NAME") from error
        return Seen(RUNNING, "Training")

    def _begin(self, job: Job, base: Path) -> None:
        _set_aside(base / "output")  # of an earlier attempt; it belongs to the image's user
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True, exist_ok=True)
        mounts = [f"{base.absolute()}:/opt/ml"]
        for channel in job.request.get("InputDataConfig", ()):
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"].rstrip("/")
            source = folders.download(uri, self._root / "s3") if folders.is_remote(uri) else Path(uri)
            mounts.append(f"{source.absolute()}:/opt/ml/input/data/{channel['ChannelName']}:ro")
        for name, content in _configs(job).items():
            (base / "input/config" / name).write_text(json.dumps(content), encoding="utf-8")
        command = [self._engine, "run", "--rm", "--name", job.name, *_gpus(), *network(job.request["Environment"])]
        for mount in mounts:
            command += ["--volume", mount]
        for key in LOGIN:
            command += ["--env", key] if key in os.environ else []
        for key, value in {**job.request["Environment"], "TRAINING_JOB_NAME": job.name}.items():
            command += ["--env", f"{key}={value}"]
        with (base / "log.txt").open("ab") as log:
            process = subprocess.Popen([*command, job.request["AlgorithmSpecification"]["TrainingImage"], "train"],
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._running[job.name] = process, time.monotonic()

    def look(self, job: Job) -> Seen:
        base, entry = self._root / job.name, self._running.get(job.name)
        code = entry[0].poll() if entry else None
        seconds = time.monotonic() - entry[1] if entry else 0.0
        log = (base / "log.txt").read_text(encoding="utf-8", errors="replace") if (base / "log.txt").is_file() else ""
        found = {name: re.findall(regex, log) for name, regex in METRICS.items()}
        seen = Seen(RUNNING, "Training", step=int(found["step"][-1]) if found["step"] else None,
                    loss=float(found["loss"][-1]) if found["loss"] else None, seconds=seconds)
        if (code is None) if entry else self._alive(job):
            return seen
        seen.billed = seconds
        failure, result = base / "output/failure", base / "model/result.json"
        if not code and result.is_file():
            seen.status, seen.result = COMPLETED, _read(result)
        elif job.name in self._stopped:
            seen.status, seen.reason = STOPPED, "it was stopped"
        else:
            told = failure.read_text(encoding="utf-8") if failure.is_file() else log[-300:]
            how = "it ended without a result" if code is None else f"exit code {code}"
            seen.status, seen.reason = FAILED, " ".join(f"{how}: {told}".split())[:1024]
        seen.detail = seen.status
        return seen

    def stop(self, job: Job) -> bool:
        """The engine waits until the container has saved; nobody waits for the engine."""
        self._stopped.add(job.name)
        process = subprocess.Popen([self._engine, "stop", "--time", str(PATIENCE), job.name], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            said = process.communicate(timeout=REFUSES)[1]
        except subprocess.TimeoutExpired:
            return True
        if process.returncode and not _absent(said):
            raise UserError(f"{self._engine} does not stop {job.name} ({' '.join(said.split())[:300]})")
        return not process.returncode

    def stop_hint(self, job: Job) -> str:
        return f"{self._engine} stop --time {PATIENCE} {job.name}"

    def _alive(self, job: Job) -> bool:
        """Whether its container runs, whoever began it."""
        found = subprocess.run([self._engine, "container", "inspect", "--format", "{{.State.Running}}", job.name],
                               capture_output=True, text=True, check=False)
        if found.returncode and not _absent(found.stderr):
            raise Unreachable(f"{self._engine} does not answer ({' '.join(found.stderr.split())[:300]})")
        return found.stdout.strip() == "true"


def _absent(said: str) -> bool:
    return "no such" in said.lower()


def _gpus() -> list[str]:
    return ["--gpus", "all"] if shutil.which("nvidia-smi") else []


def _set_aside(folder: Path) -> None:
    """Another name for a folder that holds something; renaming it needs no rights in it."""
    if folder.is_dir() and any(folder.iterdir()):
        names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))


def _read(result: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"problem": f"{result} cannot be read ({error})"}
    return found


def network(environment: Mapping[str, str]) -> list[str]:
    """The host's network for a job that is to reach a server here by a loopback address; else the engine's."""
    hosts = {urlsplit(value).hostname for value in environment.values() if "://" in value}
    return ["--network", "host"] if hosts & {"localhost", "127.0.0.1", "::1"} else []


def _configs(job: Job) -> dict[str, Any]:
    """The files that SageMaker puts into /opt/ml/input/config."""
    channels = {channel["ChannelName"]: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated",
                                         "RecordWrapperType": "None"}
                for channel in job.request.get("InputDataConfig", ())}
    return {"hyperparameters.json": job.request["HyperParameters"], "inputdataconfig.json": channels,
            "resourceconfig.json": {"current_host": "algo-1", "hosts": ["algo-1"],
                                    "current_instance_type": job.request["ResourceConfig"]["InstanceType"],
                                    "network_interface_name": "eth0"}}
