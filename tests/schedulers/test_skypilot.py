"""The task for SkyPilot: its command, run by bash with SkyPilot's variables, and its keys, read by SkyPilot itself."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreambooth import workflows
from dreambooth.config.hardware import presets
from dreambooth.schedulers import skypilot
from tests.kubernetes.workflow_files import FOLDER, ROOT

VERSION = "0.14.1"  # needs other versions of click, uvicorn and bcrypt than this project: an environment of its own
LOAD = """
import json, sys
from sky import Task
task = Task.from_yaml(sys.argv[1])
[resources] = task.resources
print(json.dumps([task.num_nodes, resources.accelerators, resources.use_spot, resources.image_id, resources.memory,
                  resources.job_recovery, task.run]))
"""


def task(*overrides: str) -> dict[str, Any]:
    return skypilot.build_task(workflows.build_spec(overrides or workflows.DEFAULT_OVERRIDES))


def command(run: str, folder: Path, nodes: int, gpus: int) -> list[str]:
    """What the task's command starts on the second of two nodes, or on the only one."""
    (folder / "python").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (folder / "python").chmod(stat.S_IRWXU)
    variables = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
                 "SKYPILOT_NODE_RANK": str(nodes - 1), "SKYPILOT_NODE_IPS": "192.0.2.1\n192.0.2.2"}
    return subprocess.run(["bash", "-eu"], input=run, text=True, check=True, capture_output=True,
                          env={"PATH": f"{folder}:{os.environ['PATH']}"} | variables).stdout.splitlines()


@pytest.mark.parametrize("nodes, gpus, launched", [(1, 1, False), (1, 0, False), (1, 4, True), (2, 1, True)])
def test_the_command_starts_one_process_per_gpu(nodes: int, gpus: int, launched: bool, tmp_path: Path) -> None:
    words = command(task()["run"], tmp_path, nodes, gpus)
    train = words.index("dreambooth.train")
    assert {*workflows.DEFAULT_OVERRIDES, *skypilot.UPLOAD} <= set(words[train:])
    assert words[:train - 1] == (["-m", "dreambooth.container.torchrun", "--nproc-per-node", str(gpus), "--nnodes",
                                  str(nodes), "--node-rank", str(nodes - 1), "--master-addr", "192.0.2.1",
                                  "--master-port", "29500"] if launched else [])


def test_an_interrupted_run_is_recovered_and_a_failed_one_is_not() -> None:
    resources = task()["resources"]
    assert resources["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [5]}
    assert resources["use_spot"] and resources["accelerators"] == "T4:1"


def test_a_typed_upload_is_kept_and_a_cpu_has_no_accelerator() -> None:
    built = task("hardware=cpu", "storage.upload=s3://mine/runs")
    assert "s3://BUCKET" not in built["run"] and "storage.upload=s3://mine/runs" in built["run"]
    assert "storage.checkpoints=true" in built["run"], "a new instance continues from them"
    assert "accelerators" not in built["resources"]
    assert skypilot._resources(presets()["local"], "x", limited=False)["accelerators"] == skypilot.ANY_GPU


def test_a_run_with_a_budget_is_not_started_again_on_an_instance_that_does_not_know_what_is_used() -> None:
    recovery = task("hardware=cpu", "budget.max_hours=1")["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0}


def installed() -> Path:
    """The Python of an environment with SkyPilot, beside .venv; it is made if it is missing."""
    environment = ROOT / f".venv-skypilot-{VERSION}"
    python = environment / "bin/python"
    if not (ready := environment / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"skypilot=={VERSION}"], check=True, timeout=600)
        ready.touch()
    return python


@pytest.mark.services  # installs SkyPilot if it is missing
def test_skypilots_loader_reads_the_committed_file(tmp_path: Path) -> None:
    python = installed()
    home = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}

    def load(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, "-c", LOAD, path], capture_output=True, text=True, check=False, env=home)

    file = FOLDER / skypilot.FILE
    read = load(file)
    assert read.returncode == 0, read.stderr
    expected = yaml.safe_load(file.read_text("utf-8"))
    nodes, gpus, spot, image, memory, recovery, run = json.loads(read.stdout.splitlines()[-1])
    assert (nodes, gpus, spot, memory, run) == (1, {"T4": 1}, True, "12+", expected["run"])
    assert list(image.values()) == ["docker:dreambooth:0.1.0"] and recovery["recover_on_exit_codes"] == [5]
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(expected | {"resources": expected["resources"] | {"misspelt": 1}}), "utf-8")
    assert "misspelt" in load(broken).stderr
