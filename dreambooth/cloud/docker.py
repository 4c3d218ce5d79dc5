"""Jobs in containers of this machine, under the contract that SageMaker keeps: the same image, the same folders."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dreambooth import storage
from dreambooth.cloud.job import COMPLETED, FAILED, RUNNING, STOPPED, Job, Seen
from dreambooth.cloud.request import METRICS
from dreambooth.errors import UserError

FOLDERS = ("input/config", "input/data", "model", "checkpoints", "output")
PATIENCE = 120  # seconds between SIGTERM and SIGKILL, as SageMaker has it


class Containers:
    """A Backend."""

    def __init__(self, root: Path, engine: str = "docker") -> None:
        self._root, self._engine = root, engine
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._stopped: set[str] = set()

    def problems(self, request: dict[str, Any]) -> list[str]:
        """What is missing on this machine."""
        if shutil.which(self._engine) is None:
            return [f"there is no {self._engine} on this machine: install it, or type hydra.launcher.mode=local"]
        return []

    def submit(self, job: Job) -> Seen:
        base = self._root / job.name
        if (base / "model/result.json").is_file():
            return self.look(job)
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "output/failure").unlink(missing_ok=True)
        mounts = [f"{base.absolute()}:/opt/ml"]
        for channel in job.request.get("InputDataConfig", ()):
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"].rstrip("/")
            source = storage.download(uri, self._root / "s3") if storage.is_remote(uri) else Path(uri)
            mounts.append(f"{source.absolute()}:/opt/ml/input/data/{channel['ChannelName']}:ro")
        for name, content in _configs(job).items():
            (base / "input/config" / name).write_text(json.dumps(content), encoding="utf-8")
        command = [self._engine, "run", "--rm", "--name", job.name, *self._gpus(),
                   *network(job.request["Environment"])]
        for mount in mounts:
            command += ["--volume", mount]
        for key, value in {**job.request["Environment"], "TRAINING_JOB_NAME": job.name}.items():
            command += ["--env", f"{key}={value}"]
        with (base / "log.txt").open("ab") as log:
            process = subprocess.Popen([*command, job.request["AlgorithmSpecification"]["TrainingImage"], "train"],
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._running[job.name] = process, time.monotonic()
        return Seen(RUNNING, "Training")

    def look(self, job: Job) -> Seen:
        base, entry = self._root / job.name, self._running.get(job.name)
        code = entry[0].poll() if entry else 0
        seconds = time.monotonic() - entry[1] if entry else 0.0
        log = (base / "log.txt").read_text(encoding="utf-8", errors="replace") if (base / "log.txt").is_file() else ""
        found = {name: re.findall(regex, log) for name, regex in METRICS.items()}
        seen = Seen(RUNNING, "Training", step=int(found["step"][-1]) if found["step"] else None,
                    loss=float(found["loss"][-1]) if found["loss"] else None, seconds=seconds)
        if code is None:
            return seen
        seen.billed = seconds
        failure, result = base / "output/failure", base / "model/result.json"
        if code == 0 and result.is_file():
            seen.status, seen.result = COMPLETED, json.loads(result.read_text(encoding="utf-8"))
        elif job.name in self._stopped:
            seen.status, seen.reason = STOPPED, "it was stopped"
        else:
            told = failure.read_text(encoding="utf-8") if failure.is_file() else log[-300:]
            seen.status, seen.reason = FAILED, " ".join(f"exit code {code}: {told}".split())[:1024]
        seen.detail = seen.status
        return seen

    def stop(self, job: Job) -> None:
        self._stopped.add(job.name)
        subprocess.run([self._engine, "stop", "--time", str(PATIENCE), job.name], capture_output=True, check=False)

    def stop_hint(self, job: Job) -> str:
        return f"{self._engine} stop --time {PATIENCE} {job.name}"

    def _gpus(self) -> list[str]:
        return ["--gpus", "all"] if shutil.which("nvidia-smi") else []


def network(environment: Mapping[str, str]) -> list[str]:
    """The host's network for a job that is to reach a server here by a loopback address; else the engine's."""
    hosts = {urlsplit(value).hostname for value in environment.values() if "://" in value}
    return ["--network", "host"] if hosts & {"localhost", "127.0.0.1", "::1"} else []


def _configs(job: Job) -> dict[str, Any]:
    """The files that SageMaker puts into /opt/ml/input/config."""
    channels = {channel["ChannelName"]: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated",
                                         "RecordWrapperType": "None"}
                for channel in job.request.get("InputDataConfig", ())}
    if job.request["ResourceConfig"]["InstanceCount"] != 1:
        raise UserError("mode=docker runs one host: type hydra.launcher.instance_count=1")
    return {"hyperparameters.json": job.request["HyperParameters"], "inputdataconfig.json": channels,
            "resourceconfig.json": {"current_host": "algo-1", "hosts": ["algo-1"],
                                    "current_instance_type": job.request["ResourceConfig"]["InstanceType"],
                                    "network_interface_name": "eth0"}}
