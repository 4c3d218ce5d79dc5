"""examples/sagemaker.ipynb: every cell runs in this environment, against a local API."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.jobs import IMAGE, ROLE, ROOT
from tests.support.s3_server import plain_client
from tests.support.sagemaker_server import OBJECTIVE, serving
from tests.support.warm_python import PYTHON

NOTEBOOK = ROOT / "examples/sagemaker.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cell(text: str, names: dict[str, Any]) -> None:
    """Run a cell as Jupyter does: the command after an exclamation mark, with names in braces, or Python."""
    if not text.startswith("!"):
        exec(compile(text, "cell", "exec"), names)
        return
    words = shlex.split(re.sub(r"\\\n", "", text[1:]).format_map(names))
    assert words[0] == "python"
    subprocess.run([PYTHON, *words[1:]], check=True)


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Jobs are created, followed, listed and stopped. The SDK sends no telemetry, which it would do in a thread."""
    from sagemaker.core.telemetry import telemetry_logging

    telemetry: list[Any] = []
    monkeypatch.setattr(telemetry_logging, "_send_telemetry_request", lambda *event: telemetry.append(event))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "dreambooth/assets/demo", "photos")
    with serving() as server:
        os.environ |= {"DREAMBOOTH_S3": "s3://bucket/dreambooth", "DREAMBOOTH_ROLE": ROLE, "DREAMBOOTH_IMAGE": IMAGE}
        plain_client().create_bucket(Bucket="bucket")
        names: dict[str, Any] = {"__name__": "__main__"}
        for text in code_cells():
            if "stop()" in text:
                server.leave_running("first-9-lost")
            run_cell(text, names)
        os.environ.pop("SAGEMAKER_VALIDATE_ROLE")
        created = {request["TrainingJobName"]: request for request in server.named("CreateTrainingJob")}
    sweep, single, blog = (
        [request for name, request in created.items() if name.startswith(prefix)]
        for prefix in ("first-", "train-2", "dreambooth-blog-"))
    assert [len(sweep), len(single), len(blog), len(created)] == [2, 1, 1, 4]
    assert [request["TrainingJobName"] for request in server.named("StopTrainingJob")] == ["first-9-lost"]
    assert telemetry == []
    assert server.services == {"s3", "sagemaker", "logs"}
    assert single[0]["EnableManagedSpotTraining"] and single[0]["HyperParameters"].keys() == sweep[0][
        "HyperParameters"].keys() - {"tracking.run_name", "train.learning_rate"}
    assert blog[0]["HyperParameters"] == {name: value if isinstance(value, str) else json.dumps(value)
                                          for name, value in names["blog"].items()}
    printed = capfd.readouterr().out
    assert printed.count(f"{OBJECTIVE} first-") == 2, printed
    assert "stopping first-9-lost" in printed and "Completed s3://bucket/dreambooth/train-2" in printed
