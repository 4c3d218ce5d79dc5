"""Part of `make proof`: runs jobs in the CPU container image, and writes a section of docs/sagemaker.md.

These checks take too long for the tests. The container engine of the tests builds the image. The image then runs in
local mode of the SageMaker SDK, versions 2 and 3, with the hyperparameters of the blog (docs/sagemaker.md), and in a
SageMaker Pipeline that trains two points of a search space. After that our launcher runs the image in `mode=docker`, in
a sweep of six jobs with an MLflow server. At last the image serves the tiny model in local mode, as an endpoint.
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

from dreambooth import __version__
from tests.support.docker_engine import Engine, engine, must
from tests.support.s3_server import serving
from tests.support.services import installed
from tools.proof.docs_section import format_table, write_section

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/sagemaker.md"
BEGIN, END = "<!-- tools/proof/container_image.py -->\n", "<!-- end -->\n"
IMAGE = "dreambooth-test"
TAG = f"{IMAGE}:{__version__}-cpu"
SDK_REQUIREMENTS = {"2": "sagemaker[local]>=2,<3", "3": "sagemaker>=3,<4"}  # by major version
SHORT_RUN = {"hardware": "cpu", "model": "tiny", "prior.num_class_images": "2", "evaluate.encoder": "none",
             "sample.every": "null"}
NO_TELEMETRY = "SchemaVersion: '1.0'\nSageMaker:\n  PythonSDK:\n    Modules:\n      TelemetryOptOut: true\n"


def main() -> None:
    work = ROOT / "build/proof/image"
    work.mkdir(parents=True, exist_ok=True)
    installed("docker-compose", "docker-compose")  # the SDK's local mode needs it
    with engine() as docker:
        docker.build("cpu", IMAGE)
        rows = []
        for check in (*(partial(run_sdk, version, docker, work) for version in SDK_REQUIREMENTS),
                      partial(run_pipeline, docker), partial(run_sweep, docker), partial(run_endpoint, docker)):
            rows.append(check())
            print(rows[-1], flush=True)
    table = format_table("the CPU image of this version", "| what ran | seconds | result |", rows)
    print(table)
    write_section(PAGE, BEGIN, END, table)


def run_sdk(version: str, docker: Engine, work: Path) -> str:
    """Run a training job with the SageMaker SDK, and a job that must fail; return a row of the table."""
    python = work / f"sdk{version}/bin/python"
    if not python.exists():
        must(sys.executable, "-m", "venv", work / f"sdk{version}")
        must(python, "-m", "pip", "install", "--quiet", SDK_REQUIREMENTS[version], timeout=1500)
    blog = json.loads((ROOT / "tests/support/golden/blog_hyperparameters.json").read_text())
    hyperparameters = blog | SHORT_RUN | {
        "manul_upload_model_path": '""', "train.max_train_steps": "2", "tracking": "none"}
    with tempfile.TemporaryDirectory() as folder, serving():
        start = time.monotonic()
        output = must(python, Path(__file__).with_name("sagemaker_local_mode.py"), version, TAG,
                      json.dumps(hyperparameters), ROOT / "dreambooth/assets/demo", folder, cwd=folder,
                      env=_local_mode_environment(docker, folder))
        seconds = time.monotonic() - start
    result = json.loads(output.splitlines()[-1])
    assert result["files"] and result["failure"] and "use_ema must be true or false" in output, output[-3000:]
    return (f"| SageMaker SDK {result['version']}, local mode, the blog's hyperparameters | {seconds:.0f} | "
            f"a model ({', '.join(result['files'])}). A second job, with the wrong value \"maybe\" for use_ema, "
            f"is refused: {result['failure']} |")


def run_pipeline(docker: Engine) -> str:
    """Execute the SageMaker Pipeline of a search space with two points; return a row of the table."""
    overrides = SHORT_RUN | {"train.max_train_steps": "4", "prior.prior_loss_weight": "0.5",
                             "evaluate.objective": "instance_loss", "tracking": "none"}
    with tempfile.TemporaryDirectory() as folder, serving():
        start = time.monotonic()
        output = must(sys.executable, "-m", "tools.proof.sagemaker_pipeline", TAG, "tiny",
                      *(f"{key}={value}" for key, value in overrides.items()), cwd=ROOT, timeout=3000,
                      env=_local_mode_environment(docker, folder))
        seconds = time.monotonic() - start
    result = json.loads(output.splitlines()[-1])
    steps, best = result["steps"], result["best"]
    assert len(steps) == 4 and best["finished"] == "2" and best["model"].endswith("/model.tar.gz"), output[-3000:]
    return (f"| the SageMaker Pipeline of `sweep=tiny` with two points, SDK {result['version']}, local mode | "
            f"{seconds:.0f} | the steps {', '.join(steps)}; {best['finished']} results, the best with "
            f"{best['name']}={float(best['objective']):.4f} |")


def run_sweep(docker: Engine) -> str:
    """Run six jobs with our launcher and one MLflow server. One job must fail. Return a row of the table."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder, _mlflow(Path(folder)) as uri:
        overrides = [f"{key}={value}" for key, value in SHORT_RUN.items()]
        start = time.monotonic()
        process = subprocess.run(
            [sys.executable, "-m", "dreambooth.train", "-m", "hydra/launcher=sagemaker", "hydra.launcher.mode=docker",
             f"hydra.launcher.image={TAG}", "hydra.launcher.sweep=six", "hydra.launcher.max_parallel=2",
             "hydra.launcher.poll_seconds=1", f"hydra.launcher.mlflow_uri={uri}", f"run_root={folder}/runs",
             *overrides, "train.max_train_steps=4",
             "train.learning_rate=1e-6,2e-6,5e-6,1e-5,2e-5,1e20"],
            env=os.environ | docker.environment, cwd=folder, capture_output=True, text=True, timeout=1500, check=False)
        seconds = time.monotonic() - start
        output = process.stdout + process.stderr
        assert process.returncode == 1, output[-5000:]
        with next(Path(folder).glob("runs/results-*.csv")).open() as file:
            rows = list(csv.DictReader(file))
        client = MlflowClient(uri)
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.sweep = 'six'")
    statuses = [row["status"] for row in rows]
    assert statuses == ["Completed"] * 5 + ["Failed"], output[-5000:]
    assert len(runs) == 6 + 1, output[-5000:]  # six jobs and the sweep itself
    return (f"| `-m hydra/launcher=sagemaker hydra.launcher.mode=docker`, six learning rates, two at a time | "
            f"{seconds:.0f} | five objectives, best {min(float(row['objective']) for row in rows[:5]):.4f}; only "
            f"learning rate 1e20 fails; in MLflow {len(runs)} runs with the tag `sweep`: six jobs and "
            "the summary run |")


def run_endpoint(docker: Engine) -> str:
    """Serve the tiny model with the requests of `dreambooth.deploy`, and draw a picture; return a row of the table."""
    with tempfile.TemporaryDirectory() as folder, serving():
        output = must(sys.executable, "-m", "tools.proof.sagemaker_endpoint", TAG,
                      ROOT / "dreambooth/assets/tiny-sd", cwd=ROOT, timeout=600,
                      env=_local_mode_environment(docker, folder))
    result = json.loads(output.splitlines()[-1])
    assert result["format"] == "PNG" and result["prompt"], output[-3000:]
    width, height = result["size"]
    return (f"| an endpoint with the requests of `dreambooth.deploy`, SDK {result['version']}, local mode | "
            f"{result['seconds']} | /ping answers after this time; a PNG of {width} x {height} px with its prompt; a "
            "request above the limit of the environment is refused |")


def _local_mode_environment(docker: Engine, folder: str) -> dict[str, str]:
    """Return the environment variables of a process that uses the SDK's local mode, without telemetry.

    Args:
        folder: a folder for the SDK's configuration file.
    """
    (Path(folder) / "sdk.yaml").write_text(NO_TELEMETRY)
    return os.environ | docker.environment | {
        "PATH": f"/usr/bin:{os.environ['PATH']}", "SAGEMAKER_VALIDATE_ROLE": "false",
        "SAGEMAKER_USER_CONFIG_OVERRIDE": f"{folder}/sdk.yaml"}


@contextmanager
def _mlflow(folder: Path) -> Iterator[str]:
    """Run an MLflow server during the `with` block, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
         "--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        deadline = time.monotonic() + 90
        while not _is_listening(port):
            assert server.poll() is None and time.monotonic() < deadline, "the MLflow server did not start"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
