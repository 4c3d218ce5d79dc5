"""The batch scripts on a real Slurm: a run that is preempted again and again, an array, two processes, scancel."""

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth import workflows
from dreambooth.config.compose import SearchSpace
from dreambooth.schedulers import slurm
from tests.schedulers.slurm_cluster import KILL_WAIT, Slurm, wait_until
from tests.support.runs import assert_same, the_run

pytestmark = pytest.mark.services  # installs Slurm if it is missing
SHORT = ("hardware=cpu", "tracking=none", "evaluate.encoder=none", "sample.every=null", "train.train_batch_size=1",
         "prior.with_prior_preservation=false", "train.max_train_steps=4", "evaluate.objective=instance_loss")
# Long enough for a second of Slurm's scheduler in each of the three phases.
LONG = ("hardware=cpu", "tracking=none", "evaluate.encoder=none", "train.train_batch_size=1",
        "prior.num_class_images=5", "prior.sample_batch_size=1", "prior.num_inference_steps=40",
        "train.max_train_steps=30", "checkpoint.every=5", "sample.every=30", "sample.num_inference_steps=120",
        "sample.images_per_prompt=1")
POINTS = SearchSpace("tiny", {"train.learning_rate": ("1e-4", "3e-4"), "train.seed": ("0", "1")})
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # nodes run the python of the PATH


def spec(*overrides: str) -> workflows.WorkflowSpec:
    return replace(workflows.build_spec(overrides, "tiny"), space=POINTS)


def submit(cluster: Slurm, script: str, folder: Path, *options: str) -> str:
    """Submit a script from a folder, which gets the job's log and runs."""
    exported = ",".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    return cluster.submit(script, f"--export=ALL,{exported}", "--mem=0", "--output=log", *options, cwd=folder)


def train(root: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", *launcher, "dreambooth.train", f"run_root={root}", *words],
                            env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> None:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output


def preempt(cluster: Slurm) -> None:
    """Let a job of another partition take both CPUs for an instant."""
    job = cluster.submit("#!/bin/bash\ntrue\n", "--partition=urgent", "--ntasks=2", "--output=/dev/null")
    assert cluster.ended(job) == "COMPLETED"


# -- one run -------------------------------------------------------------------------------------------------------

def test_a_run_that_is_preempted_in_each_phase_has_the_bits_of_an_undisturbed_one(
    cluster: Slurm, tmp_path: Path
) -> None:
    """Its class images and its samples are preempted without grace time, its training with 20 seconds of it."""
    log = tmp_path / "log"
    undisturbed = train(tmp_path / "undisturbed", *LONG)
    job = submit(cluster, slurm.build_train_script(spec(*LONG)), tmp_path, "--cpus-per-task=2")

    def text() -> str:
        return log.read_text() if log.exists() else ""

    phases: list[tuple[int, Callable[[], object], str]] = [
        (0, lambda: list(tmp_path.rglob("class_images/*/00001.png")), "SIGTERM: stopped before the first step"),
        (20, lambda: re.search(r"training ([5-9]|1\d)/30", text()), r"SIGTERM: stopped and saved after step \d+;"),
        (0, lambda: "training 30/30" in text(), "SIGTERM: stopped and saved after step 30;")]
    for number, (grace, reached, message) in enumerate(phases, 1):
        cluster("scontrol", "update", "PartitionName=spot", f"GraceTime={grace}")
        wait_until(reached, 120, text)
        preempt(cluster)
        wait_until(lambda number=number: cluster.field(job, "Restarts") == str(number), 60, text)
        assert len(re.findall("SIGTERM: stopped", text())) == number and re.search(message, text()), text()
    assert cluster.ended(job) == "COMPLETED", text()
    finished(undisturbed)
    assert "Traceback" not in text()
    assert_same(the_run(tmp_path / "runs"), the_run(tmp_path / "undisturbed"))


def test_scancel_saves_the_run_and_does_not_queue_it_again(cluster: Slurm, tmp_path: Path) -> None:
    job = submit(cluster, slurm.build_train_script(spec(*SHORT, "train.max_train_steps=5000")), tmp_path)
    wait_until(lambda: any('"loss"' in path.read_text() for path in tmp_path.glob("runs/demo-*/metrics.jsonl")), 120)
    began = time.monotonic()
    cluster("scancel", job)
    assert cluster.ended(job) == "CANCELLED"
    assert time.monotonic() - began < KILL_WAIT
    text = (tmp_path / "log").read_text()
    [step] = re.findall(r"SIGTERM: stopped and saved after step (\d+);", text)
    assert (the_run(tmp_path / "runs") / f"checkpoints/step-{int(step):06}/state.json").is_file()
    assert cluster.field(job, "Restarts") == "0"


def test_srun_with_two_processes_is_torchrun_with_two(cluster: Slurm, tmp_path: Path) -> None:
    script = slurm.build_train_script(spec(*SHORT))
    job = submit(cluster, script, tmp_path, "--ntasks-per-node=2", "--cpus-per-task=1")
    assert cluster.ended(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("objective=") == 1
    finished(train(tmp_path / "torchrun", *SHORT,
                   launcher=("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")))
    assert_same(the_run(tmp_path / "runs"), the_run(tmp_path / "torchrun"))


# -- sweeps --------------------------------------------------------------------------------------------------------

def test_an_array_and_hydras_launcher_make_the_same_four_runs(cluster: Slurm, tmp_path: Path) -> None:
    """The check runs before the array; one point of Hydra's sweep is wrong, which must not lose the others."""
    check = submit(cluster, slurm.build_check_script(workflows.build_spec(["hardware=cpu"], "tiny")), tmp_path)
    array = submit(cluster, slurm.build_sweep_script(spec(*SHORT)), tmp_path, "--cpus-per-task=1",
                   f"--dependency=afterok:{check}", "--output=log-%a")
    sweep = subprocess.run(
        [sys.executable, "-m", "dreambooth.train", "-m", "hydra/launcher=slurm", "hydra.launcher.poll_seconds=1",
         "hydra.launcher.cpus_per_task=1", "hydra.launcher.max_parallel=2", "run_root=hydra", *SHORT,
         "train.learning_rate=1e-4,3e-4,-1", "train.seed=0,1", "tracking.sweep=mine"],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600)
    assert (sweep.returncode, "Traceback" in sweep.stderr) == (1, False), sweep.stdout + sweep.stderr
    assert "dreambooth: train.learning_rate must be above 0" in sweep.stderr
    assert cluster.ended(array) == "COMPLETED", (tmp_path / "log").read_text()
    assert "8 runs, checked and planned" in (tmp_path / "log").read_text()
    with (tmp_path / "hydra/results-mine.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["Completed"] * 4 + ["Failed"] * 2
    names = {path.parent.name for path in (tmp_path / "runs").glob("demo-*/result.json")}
    assert names == {row["job"] for row in rows[:4]}
    for name in names:
        assert_same(tmp_path / "runs" / name, tmp_path / "hydra" / name)
