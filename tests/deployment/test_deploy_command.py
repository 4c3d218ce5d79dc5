"""The command as a process, against a local server: what it prints, its exit codes, and what it leaves behind."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud.jobs import IMAGE, ROLE, ROOT
from tests.deployment.endpoint_server import EndpointServer, serving_endpoints
from tests.deployment.test_model_artifact import write_run
from tests.support.s3_server import plain_client
from tests.support.warm_python import PYTHON

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EndpointServer]:
    for key in ("ADMIN", "USER"):
        monkeypatch.delenv(f"SAGEMAKER_{key}_CONFIG_OVERRIDE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "xdg"))
    with serving_endpoints() as found:
        plain_client().create_bucket(Bucket="bucket")
        os.environ |= {"DREAMBOOTH_IMAGE": IMAGE, "DREAMBOOTH_ROLE": ROLE, "DREAMBOOTH_S3": "s3://bucket/dreambooth"}
        yield found


def start(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([PYTHON, "-m", "dreambooth.deploy", "name=toy", "poll_seconds=1", *words], text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*words: str) -> tuple[int, str, str]:
    process = start(*words)
    output, errors = process.communicate(timeout=200)
    return process.returncode, output, errors


def test_the_life_of_an_endpoint(server: EndpointServer, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs/toy")
    shutil.rmtree(folder / "model")
    shutil.copytree(ROOT / "dreambooth/assets/tiny-sd", folder / "model")
    server.service.steps = 1
    deploy = (f"run={folder}", "instance=ml.g4dn.xlarge", "max_usd_hour=1")
    code, output, errors = run(*deploy)
    assert (code, errors) == (0, "")
    assert "1 x ml.g4dn.xlarge at $0.7364/h: $0.7364 per hour, $538 per month" in output
    assert "toy  InService  toy-v1" in output
    [model] = server.service.named("CreateModel")
    uri = model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"]
    s3 = plain_client()
    stored = s3.get_object(Bucket="bucket", Key=uri.removeprefix("s3://bucket/") + "model/model_index.json")
    assert stored["Body"].read() == (folder / "model/model_index.json").read_bytes()

    code, output, _ = run(f"run={uri}", "kind=async", "instance=ml.g4dn.xlarge", "name=later", "max_instances=2")
    assert code == 0 and "without requests it costs nothing" in output
    assert server.service.targets["endpoint/later/variant/main"]["MinCapacity"] == 0

    server.service.outcome = "The primary container for production variant main did not pass the ping health check."
    code, _, errors = run(*deploy, "+environment.DREAMBOOTH_SERVE_MAX_STEPS=50")
    assert code == 1 and "the update of toy failed and toy-v1 serves as before" in errors
    assert errors.count("\n") == 1 and "aws logs tail /aws/sagemaker/Endpoints/toy" in errors
    code, output, errors = run(*deploy, "+environment.DREAMBOOTH_SERVE_MAX_STEPS=50")
    assert (code, errors) == (0, "") and "toy  InService  toy-v2" in output
    code, output, _ = run("action=rollback")
    assert code == 0 and "toy  InService  toy-v1" in output
    code, output, _ = run("action=status")
    assert code == 0 and "toy-v1  serves" in output

    server.service.steps = 10**6
    process = start(*deploy, "+environment.DREAMBOOTH_SERVE_MAX_STEPS=60")
    while not server.service.endpoints["toy"]["pending"]:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 5
    assert errors.startswith("dreambooth: interrupted while updating toy; the endpoint exists and may cost money")
    server.service.steps = server.service.endpoints["toy"]["left"] = 1
    for name in ("toy", "later"):
        code, output, errors = run("action=delete", f"name={name}")
        assert (code, errors) == (0, "") and "it costs nothing any more" in output
    service = server.service
    assert not any((service.endpoints, service.configs, service.models, service.targets, service.policies))
    code, _, errors = run("action=delete")
    assert code == 1 and "there is no endpoint toy of dreambooth in us-east-1" in errors
