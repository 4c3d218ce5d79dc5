"""`mlflow models serve` with a champion, in an environment that holds what requirements.txt names and nothing else."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from packaging.requirements import Requirement

from dreambooth.config.generate import Generate
from dreambooth.inference.generate_images import draw
from dreambooth.sweeps.promotion import PromotionOptions, promote
from dreambooth.tracking.registered_models import local_path
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.signals import StopRequest
from tests.support.runs import trial
from tests.support.services import free_port
from tests.tracking.test_registered_models import TINY, add_adapter

INTERPRETER = getattr(sys, "_base_executable", sys.executable)  # with -S it sees no site-packages
ROW = {"prompt": "a zwx toy", "seed": 5, "num_inference_steps": 4}


def needed(lines: Sequence[str]) -> dict[str, Distribution]:
    """The distributions that pip would install for these requirements, by name."""
    found: dict[str, Distribution] = {}
    waiting, seen = list(lines), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        found[name] = distribution(requirement.name)
        for line in found[name].requires or []:
            one = Requirement(line)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}):
                waiting.append(line.partition(";")[0])
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function of requirements: the variables of a process that sees only these packages, and not this one."""
    root = tmp_path_factory.mktemp("environment")
    server = root / "bin/uvicorn"
    server.parent.mkdir()
    server.write_text(f'#!/bin/sh\nexec {INTERPRETER} -S -m uvicorn "$@"\n')
    server.chmod(0o755)

    def build(lines: Sequence[str]) -> dict[str, str]:
        packages = root / "site"
        packages.mkdir(exist_ok=True)
        for one in needed(lines).values():
            for name in {file.parts[0] for file in one.files or [] if ".." not in file.parts} - {"__pycache__"}:
                if not (packages / name).exists():
                    (packages / name).symlink_to(Path(str(one.locate_file(name))))
        return os.environ | {"PYTHONPATH": str(packages), "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
                             "OMP_NUM_THREADS": str(torch.get_num_threads()), "MLFLOW_DISABLE_TELEMETRY": "true"}

    return build


@contextmanager
def served(address: str, variables: dict[str, str], log: Path) -> Iterator[str]:
    """Run `mlflow models serve`; yield the address of the server."""
    port = free_port()
    words = ["-m", "mlflow", "models", "serve", "-m", address, "--env-manager", "local", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen([INTERPRETER, "-S", *words], env=variables, stdout=file, stderr=file, cwd=log.parent,
                                   start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            try:
                requests.get(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_mlflow_serves_the_champion_as_generate_draws(
        kind: str, environment: Any, empty_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(empty_db, tmp_path / "mlflow.db")
    run = trial(tmp_path, "a", 0.2, **TINY if kind == "adapter" else {})
    if kind == "adapter":
        add_adapter(run)
    else:
        shutil.copytree(resolve_asset("package:tiny-sd"), run / "model", dirs_exist_ok=True)
    address = promote("s", tmp_path, PromotionOptions())["model_uri"]
    draw(Generate(run=str(run), prompt=ROW["prompt"], seed=ROW["seed"], num_images=2, num_inference_steps=4,
                  out=str(tmp_path / "out")), StopRequest())
    folder = Path(str(local_path(address, run_root=tmp_path)))
    variables = environment((folder / "requirements.txt").read_text().split())
    for missing in ("dreambooth", "boto3", "bitsandbytes", "optuna"):
        assert subprocess.run([INTERPRETER, "-S", "-c", f"import {missing}"], env=variables, cwd=tmp_path,
                              capture_output=True, check=False).returncode == 1, missing
    variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    with served(address, variables, tmp_path / "log") as server:
        answer = requests.post(f"{server}/invocations", json={"inputs": [ROW | {"num_images": 2}]}, timeout=120)
        wrong = requests.post(f"{server}/invocations", json={"inputs": [ROW | {"width": 20}]}, timeout=120)
    assert answer.status_code == 200, (tmp_path / "log").read_text()
    for number, picture in enumerate(answer.json()["predictions"]):
        assert base64.b64decode(picture["image"]) == (tmp_path / f"out/a-zwx-toy-seed{5 + number}.png").read_bytes()
    assert wrong.status_code == 400 and "the nearest sizes are 16x64 and 24x64" in wrong.text
