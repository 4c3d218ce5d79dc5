"""The command itself, with the shipped tiny base: pictures as generate draws them, adapters, kills and stops."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch

from tests.support.weights import make_adapter

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class Server:
    """A running `python -m dreambooth.serve`."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process, self.log, self.url = process, log, ""

    @property
    def worker(self) -> psutil.Process:
        [worker] = psutil.Process(self.process.pid).children()
        return worker

    def wait(self) -> None:
        """Wait until the server is ready."""
        until = time.monotonic() + 120
        while not (found := re.search(r"ready: .* on (\S+)", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
        self.url = found[1]

    def metric(self, name: str) -> float:
        found = re.search(rf"^dreambooth_{name} (\S+)$", requests.get(f"{self.url}/metrics", timeout=10).text, re.M)
        assert found
        return float(found[1])

    def draw(self, prompt: str = "a toy", token: str = "", **more: Any) -> requests.Response:
        body = {"prompt": prompt, "num_inference_steps": 2} | more
        headers = {"Accept": "image/png"} | ({"Authorization": f"Bearer {token}"} if token else {})
        return requests.post(f"{self.url}/invocations", json=body, headers=headers, timeout=60)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    log = folder / "log.txt"
    with log.open("w") as file:
        threads = str(torch.get_num_threads())  # pictures depend on it, in their last bits
        process = subprocess.Popen(
            [sys.executable, "-m", "dreambooth.serve", "base=package:tiny-sd", "port=0", *options], stdout=file,
            stderr=file, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads})
    server = Server(process, log)
    try:
        server.wait()
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    for number in range(4):
        make_adapter(folder / "adapters" / f"toy-{number}", number)
    with serving(folder, f"adapters={folder}/adapters", "max_adapters=2", "max_batch=1") as server:
        yield server


def generated(folder: Path, **options: Any) -> bytes:
    """The picture that `generate` writes."""
    from dreambooth.config.generate import Generate
    from dreambooth.inference.generate_images import draw
    from dreambooth.utils.signals import StopRequest

    draw(Generate(base="package:tiny-sd", prompt="a toy", num_images=1, num_inference_steps=2, out=str(folder),
                  **options), StopRequest())
    [path] = folder.glob("a-toy-seed*.png")
    return path.read_bytes()


def test_adapters_come_in_turn_and_each_picture_is_that_of_generate(server: Server, tmp_path: Path) -> None:
    adapters = server.log.parent / "adapters"
    pictures = {name: server.draw(adapter=name).content for name in [f"toy-{number}" for number in range(4)]}
    plain = server.draw(seed=3).content
    assert "dreambooth_adapters_loaded 2.0" in requests.get(f"{server.url}/metrics", timeout=10).text
    assert plain == generated(tmp_path / "plain", seed=3)
    for name in ("toy-0", "toy-3"):
        assert pictures[name] == generated(tmp_path / name, lora=str(adapters / name))
    assert len(set(pictures.values())) == 4
    assert {name: server.draw(adapter=name).content for name in pictures} == pictures


def test_a_new_adapter_is_served_without_a_restart(server: Server) -> None:
    assert server.draw(adapter="late").status_code == 422
    make_adapter(server.log.parent / "adapters/late", 9)
    assert server.draw(adapter="late").status_code == 200
    listed = requests.get(f"{server.url}/v1/models", timeout=10).json()
    assert [model["id"] for model in listed["data"]] == ["tiny-sd", "late", *(f"toy-{number}" for number in range(4))]


def test_what_only_the_model_can_refuse_is_a_sentence(server: Server) -> None:
    answer = server.draw("toy " * 100)
    assert answer.status_code == 422 and "tokens" in answer.json()["message"]
    (server.log.parent / "adapters/broken.safetensors").write_bytes(b"garbage" * 99)
    answer = server.draw(adapter="broken")
    assert answer.status_code == 422 and "cannot be read" in answer.json()["message"]
    assert server.draw().status_code == 200


def test_a_killed_worker_is_replaced_and_no_request_hangs(server: Server) -> None:
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(server.draw, num_inference_steps=100) for _ in range(3)]
        while server.metric("queue_pictures") < 2:
            time.sleep(0.02)
        killed = server.worker.pid
        os.kill(killed, signal.SIGKILL)
        codes = sorted(answer.result().status_code for answer in answers)
    assert codes == [200, 200, 503]
    assert server.worker.pid != killed and requests.get(f"{server.url}/ping", timeout=10).status_code == 200


def test_a_stopped_server_delivers_running_pictures_and_ends_with_code_0(tmp_path: Path) -> None:
    with serving(tmp_path, "max_batch=2", "max_wait_ms=300") as server, ThreadPoolExecutor(4) as threads:
        children = psutil.Process(server.process.pid).children()
        answers = [threads.submit(server.draw, num_inference_steps=50) for _ in range(4)]
        while server.metric("batch_pictures_sum") + server.metric("queue_pictures") < 4:  # pictures that were accepted
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 4, [a.result().text for a in answers]
        assert server.process.wait(30) == 0, server.log.read_text()
        assert psutil.wait_procs(children, timeout=20)[1] == []
        assert "Traceback" not in server.log.read_text()


def test_the_worker_ends_with_a_killed_front_process(server: Server) -> None:
    """Last in this file: the server of the module is gone afterwards."""
    worker = server.worker
    server.process.kill()
    server.process.wait()
    assert psutil.wait_procs([worker], timeout=20)[1] == []
