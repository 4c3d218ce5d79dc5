"""`make proof`, the image: what takes too long for the tests. Writes a part of docs/sagemaker.md.

The CPU image is built by the engine of the tests and run by the SageMaker SDK's local mode, versions 2 and 3, with the
hyperparameters of the blog; then by our launcher, a sweep of six in `mode=docker` against an MLflow server.
"""

import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/sagemaker.md"
BEGIN, END = "<!-- tools/proof/image.py -->\n", "<!-- end -->\n"
sys.path.insert(0, str(ROOT / "tests"))

from engine import Engine, engine, must  # noqa: E402
from s3_server import serving  # noqa: E402
from services import installed  # noqa: E402

from dreambooth import __version__  # noqa: E402
from tools.proof import page  # noqa: E402

NAME = "dreambooth-test"
TAG = f"{NAME}:{__version__}-cpu"
SDKS = {"2": "sagemaker[local]>=2,<3", "3": "sagemaker>=3,<4"}
SHORT = {"hardware": "cpu", "model": "tiny", "prior.num_class_images": "2", "evaluate.encoder": "none",
         "sample.every": "null"}
QUIET = "SchemaVersion: '1.0'\nSageMaker:\n  PythonSDK:\n    Modules:\n      TelemetryOptOut: true\n"


def main() -> None:
    work = ROOT / "build/proof/image"
    work.mkdir(parents=True, exist_ok=True)
    installed("docker-compose", "docker-compose")  # by which the SDK runs a job here
    with engine() as docker:
        docker.build("cpu", NAME)
        rows = []
        for ran in (*(partial(sdk, version, docker, work) for version in SDKS), partial(sweep, docker)):
            rows.append(ran())
            print(rows[-1], flush=True)
    found = page.table("the CPU image of this version", "| what ran | seconds | seen |", rows)
    print(found)
    page.put(DOCS, BEGIN, END, found)


def sdk(version: str, docker: Engine, work: Path) -> str:
    """A training job by SageMaker's own SDK, and one that must fail."""
    python = work / f"sdk{version}/bin/python"
    if not python.exists():
        must(sys.executable, "-m", "venv", work / f"sdk{version}")
        must(python, "-m", "pip", "install", "--quiet", SDKS[version], timeout=1500)
    blog = json.loads((ROOT / "tests/support/golden/blog_hyperparameters.json").read_text())
    asked = blog | SHORT | {"manul_upload_model_path": '""', "train.max_train_steps": "2", "tracking": "none"}
    with tempfile.TemporaryDirectory() as folder, serving():
        (Path(folder) / "sdk.yaml").write_text(QUIET)
        began = time.monotonic()
        told = must(python, Path(__file__).with_name("local_mode.py"), version, TAG, json.dumps(asked),
                    ROOT / "dreambooth/assets/demo", folder, cwd=folder, env=os.environ | docker.environment | {
                        "PATH": f"/usr/bin:{os.environ['PATH']}", "SAGEMAKER_VALIDATE_ROLE": "false",
                        "SAGEMAKER_USER_CONFIG_OVERRIDE": f"{folder}/sdk.yaml"})
        seconds = time.monotonic() - began
    found = json.loads(told.splitlines()[-1])
    assert found["files"] and found["refused"] and "use_ema must be true or false" in told, told[-3000:]
    return (f"| SageMaker SDK {found['version']}, local mode, the blog's hyperparameters | {seconds:.0f} | "
            f"a model ({', '.join(found['files'])}); with \"maybe\" for use_ema: {found['refused']} |")


def sweep(docker: Engine) -> str:
    """Six jobs by our launcher in `mode=docker`, of which one fails; all in one MLflow server."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder, _mlflow(Path(folder)) as uri:
        words = [f"{key}={value}" for key, value in SHORT.items()]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "dreambooth.train", "-m", "hydra/launcher=sagemaker", "hydra.launcher.mode=docker",
             f"hydra.launcher.image={TAG}", "hydra.launcher.sweep=six", "hydra.launcher.max_parallel=2",
             "hydra.launcher.poll_seconds=1", f"hydra.launcher.mlflow_uri={uri}", f"run_root={folder}/runs",
             *words, "train.max_train_steps=4",
             "train.learning_rate=1e-6,2e-6,5e-6,1e-5,2e-5,1e20"],
            env=os.environ | docker.environment, cwd=folder, capture_output=True, text=True, timeout=1500, check=False)
        seconds = time.monotonic() - began
        told = done.stdout + done.stderr
        assert done.returncode == 1, told[-5000:]
        with next(Path(folder).glob("runs/results-*.csv")).open() as file:
            rows = list(csv.DictReader(file))
        client = MlflowClient(uri)
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.sweep = 'six'")
    ends = [row["status"] for row in rows]
    assert ends == ["Completed"] * 5 + ["Failed"], told[-5000:]
    assert len(runs) == 6 + 1, told[-5000:]  # and the sweep itself
    return (f"| `-m hydra/launcher=sagemaker hydra.launcher.mode=docker`, six learning rates, two at a time | "
            f"{seconds:.0f} | five objectives, best {min(float(row['objective']) for row in rows[:5]):.4f}; 1e20 fails "
            f"alone; {len(runs)} runs in MLflow with the tag `sweep` |")


@contextmanager
def _mlflow(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
         "--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        until = time.monotonic() + 90
        while not _answers(port):
            assert server.poll() is None and time.monotonic() < until, "the MLflow server did not start"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _answers(port: int) -> bool:
    with socket.socket() as ask:
        return ask.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
