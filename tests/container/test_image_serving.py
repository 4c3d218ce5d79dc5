"""The built CPU image as a server: the tiny base, SageMaker's contract for hosting, a read-only root, a stop."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.support.image import NAME, Image
from tests.support.weights import make_adapter

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.container
# Run inside the container, which has no network: asks the server; prints the status, and what follows of the answer.
ASK = """
import json, sys, urllib.error, urllib.request
port, path, body = sys.argv[1:4]
request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body.encode() or None,
                                 {"Content-Type": "application/json"})
try:
    answer = urllib.request.urlopen(request, timeout=60)
except urllib.error.HTTPError as error:
    answer = error
except OSError:
    sys.exit("nobody listens")
print(answer.status, answer.read().decode())
"""


@contextmanager
def serving(image: Image, *arguments: str, options: tuple[str, ...] = ()) -> Iterator[str]:
    """Run `serve` in the background; yield the name of the container."""
    name = f"{NAME}-{uuid4().hex[:8]}"
    image.docker.must("run", "--detach", "--network", "none", "--cpus", "2", "--name", name, *options, image.tag,
                      "serve", *arguments)
    try:
        yield name
    finally:
        image.docker("rm", "--force", name)


def ask(image: Image, name: str, path: str, body: object = None, port: int = 8080) -> tuple[int, str]:
    """Status and content of an answer; status 0 if nobody listens."""
    result = image.docker("exec", name, "python", "-c", ASK, str(port), path, json.dumps(body) if body else "")
    status, _, content = result.stdout.partition(" ")
    return int(status or 0), content


def wait(image: Image, name: str, port: int = 8080) -> None:
    """Wait until /ping answers 200."""
    until = time.monotonic() + 60
    while ask(image, name, "/ping", port=port)[0] != 200:
        running = image.docker.must("inspect", "--format", "{{.State.Running}}", name).strip() == "true"
        assert running and time.monotonic() < until, image.log(name)
        time.sleep(0.2)


def test_it_serves_the_tiny_base_after_seconds_and_stops_with_code_0(image: Image) -> None:
    with serving(image, "base=package:tiny-sd") as name:
        began = time.monotonic()
        wait(image, name)
        seconds = time.monotonic() - began
        used = image.docker.must("exec", name, "sh", "-c", "cat /proc/[0-9]*/stat").splitlines()
        ticks = sum(int(word) for line in used for word in line.rpartition(")")[2].split()[11:13])
        print(f"/ping answered 200 after {seconds:.1f} s, with {ticks / 100:.1f} s of CPU time")
        status, content = ask(image, name, "/invocations", {"prompt": "a toy", "num_inference_steps": 2})
        assert status == 200 and len(json.loads(content)["predictions"]) == 1
        processes = image.docker.must("exec", name, "sh", "-c", "sed -n 's/^Uid:.\\([0-9]*\\).*/\\1/p' /proc/*/status")
        assert processes.split()[0] == "1000", "the server is root"
        image.docker.must("stop", "--time", "60", name)
        assert image.wait(name) == 0, image.log(name)
    assert seconds < 60  # 15 s on two free cores, see docs/serving.md


def test_it_hosts_an_adapter_as_sagemaker_does(image: Image, tmp_path: Path) -> None:
    """The model folder of a training job, read-only; another port; another user; a root that cannot be written."""
    make_adapter(tmp_path / "model/model", seed=1)
    (tmp_path / "model/run.json").write_text(json.dumps({"settings": {"model.source": "package:tiny-sd"}}))
    make_adapter(tmp_path / "model/adapters/second", seed=2)
    subprocess.run(["chmod", "-R", "go+rX", tmp_path], check=True)
    options = ("--volume", f"{tmp_path}/model:/opt/ml/model:ro", "--user", "1234:1234", "--cap-drop", "ALL",
               "--read-only", "--tmpfs", "/tmp", "--env", "SAGEMAKER_BIND_TO_PORT=9000",
               "--env", "DREAMBOOTH_SERVE_MAX_STEPS=3")
    with serving(image, options=options) as name:
        wait(image, name, 9000)
        pictures = set()
        for adapter in (None, "second"):
            body = {"instances": [{"prompt": "a toy", "num_inference_steps": 2, "adapter": adapter}]}
            status, content = ask(image, name, "/invocations", body, 9000)
            assert status == 200, content + image.log(name)
            pictures |= {one["image"] for one in json.loads(content)["predictions"]}
        assert len(pictures) == 2
        status, content = ask(image, name, "/invocations", {"prompt": "a toy", "num_inference_steps": 4}, 9000)
        assert status == 422 and "from 1 to 3" in content


def test_a_model_folder_without_a_model_is_a_sentence(image: Image, tmp_path: Path) -> None:
    result = image.run("serve", base=tmp_path)
    assert result.returncode == 1
    assert "dreambooth: there is no model in /opt/ml/model" in result.stderr


COUNT = int(os.environ.get("SERVING_REQUESTS", "150"))  # 1000 for docs/serving.md
LOAD = """
import json, sys, time
sys.path.insert(0, "/code")
from http_load import run_load
load = run_load(8080, "/invocations", int(sys.argv[1]), 16,
                lambda number: {"prompt": f"a toy {number}", "seed": number, "num_inference_steps": 4}, patience=0.2)
print(json.dumps({"codes": load.codes, "unsaid": load.without_retry_after, "seconds": load.seconds}))
"""


def load(image: Image, name: str, count: int) -> dict[str, Any]:
    """Send requests by 16 clients in a container beside the server. Return the number of answers by status."""
    result = image.docker.must(
        "run", "--rm", "--network", f"container:{name}", "--volume", f"{ROOT / 'benchmarks'}:/code:ro", image.tag,
        "python", "-c", LOAD, str(count), timeout=900)
    found: dict[str, Any] = json.loads(result)
    return found


def workers(image: Image, name: str) -> dict[int, int]:
    """The resident MiB of each worker process, by process id."""
    listed = image.docker.must("exec", name, "sh", "-c", "for f in /proc/[0-9]*; do echo $(tr '\\0' ' ' < $f/cmdline) "
                               ":$(basename $f):$(sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' $f/status); done")
    found = re.findall(r"serving\.worker\b.*:(\d+):(\d+)", listed)
    return {int(number): int(size) // 1024 for number, size in found}


def test_no_request_is_lost_under_load_and_a_stop_delivers_what_runs(image: Image) -> None:
    with serving(image, "base=package:tiny-sd", "max_queue=8", options=("--read-only", "--tmpfs", "/tmp")) as name:
        wait(image, name)
        load(image, name, 20)
        before = workers(image, name)
        found = load(image, name, COUNT)
        print(f"{COUNT} requests: {found}; MiB of workers: {before}, {workers(image, name)} afterwards")
        assert found["codes"].keys() == {"200", "429"} and sum(found["codes"].values()) == COUNT
        assert found["unsaid"] == 0, "429 without Retry-After"
        interrupted: dict[str, Any] = {}
        clients = threading.Thread(target=lambda: interrupted.update(load(image, name, COUNT)))
        clients.start()
        time.sleep(4)
        [worker] = workers(image, name)
        image.docker.must("exec", name, "sh", "-c", f"kill -9 {worker}")
        clients.join()
        print(f"with a killed worker: {interrupted}")
        assert interrupted["codes"].keys() <= {"200", "429", "503"} and sum(interrupted["codes"].values()) == COUNT
        wait(image, name)
        assert workers(image, name).keys().isdisjoint({worker})
        stopped: dict[str, Any] = {}
        clients = threading.Thread(target=lambda: stopped.update(load(image, name, COUNT)))
        clients.start()
        time.sleep(4)
        image.docker.must("stop", "--time", "60", name)
        assert image.wait(name) == 0, image.log(name)
        clients.join()
        assert stopped["codes"]["200"] > 0 and stopped["unsaid"] == 0
