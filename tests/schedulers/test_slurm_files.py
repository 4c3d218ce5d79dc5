"""The batch scripts, run by bash with stand-ins for Slurm's programs; processes of srun; the array of a sweep."""

import json
import os
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from dreambooth import cli, workflows
from dreambooth.config.compose import SearchSpace
from dreambooth.errors import ConfigError, Interrupted, UserError
from dreambooth.runtime import srun
from dreambooth.schedulers import slurm, slurm_array
from hydra_plugins.dreambooth_slurm import _core
from tests.kubernetes.workflow_files import FOLDER
from tests.support.tools import tool

PROMPT = """a "zwx"'s $HOME `id` toy"""
SPACE = SearchSpace("tiny", {"train.seed": ("0", "1"), "dataset.instance_prompt": (f"'{PROMPT}'", "x")})


def shipped() -> workflows.WorkflowSpec:
    return workflows.build_spec(["hardware=cpu"], "tiny")


def run(script: str, folder: Path, code: int = 0, state: str = "RUNNING", **environment: str) -> tuple[int, list[str]]:
    """Run a batch script. Return its exit code and the lines that the stand-ins of Slurm's programs wrote."""
    log = folder / "log"
    for name, answer in (("srun", f"exit {code}"), ("squeue", f"echo {state}"), ("scontrol", "")):
        program = folder / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@" >> {log}\n{answer}\n')
        program.chmod(stat.S_IRWXU)
    log.unlink(missing_ok=True)
    result = subprocess.run(["bash"], input=script, text=True, cwd=folder, capture_output=True, check=False, env={
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5"} | environment)
    assert result.stderr == "", result.stderr
    return result.returncode, log.read_text().splitlines()


def test_shellcheck_accepts_the_scripts() -> None:
    scripts = sorted(FOLDER.glob("slurm/*.sbatch"))
    assert [path.name for path in scripts] == ["check.sbatch", "sweep.sbatch", "train.sbatch"]
    subprocess.run([tool("shellcheck"), *scripts], check=True)


@pytest.mark.parametrize("code, state, again", [
    (5, "RUNNING", True), (5, "COMPLETING", False), (0, "RUNNING", False), (6, "RUNNING", False)])
def test_only_a_saved_run_that_slurm_does_not_stop_itself_is_queued_again(
    code: int, state: str, again: bool, tmp_path: Path
) -> None:
    """At the time limit, and in the grace time of a preemption. After scancel, the job is completing."""
    result, lines = run(slurm.build_train_script(shipped()), tmp_path, code, state)
    assert (result, lines[-3:] == ["scontrol", "requeue", "7"]) == (code, again)
    script = slurm.build_sweep_script(replace(shipped(), space=SPACE))
    result, lines = run(script, tmp_path, code, state, SLURM_ARRAY_TASK_ID="2")
    assert (result, lines[-3:] == ["scontrol", "requeue", "5_2"]) == (code, again), "one task of the array"


def test_a_task_of_an_array_passes_its_point_of_the_search_space_unchanged(tmp_path: Path) -> None:
    script = slurm.build_sweep_script(replace(shipped(), space=SPACE))
    assert "#SBATCH --array=0-3%4\n" in script
    for number, trial in enumerate(SPACE.trials()):
        _, lines = run(script, tmp_path, SLURM_ARRAY_TASK_ID=str(number))
        assert lines[2:5] == ["python", "-m", "dreambooth.train"] and tuple(lines[-len(trial):]) == trial
        assert {"hardware=cpu", "tracking.sweep=slurm-5", f"run_root={tmp_path}/runs"} <= set(lines)


def test_an_image_is_run_by_pyxis(tmp_path: Path) -> None:
    runs = tmp_path / "runs of mine"
    _, lines = run(slurm.build_train_script(shipped()), tmp_path, IMAGE="me#dreambooth:1", RUN_ROOT=str(runs))
    assert "--container-image=me#dreambooth:1" in lines and "--no-container-entrypoint" in lines
    assert f"--container-mounts={tmp_path}:{tmp_path},{runs}:{runs}" in lines and runs.is_dir()


def test_a_machine_has_a_process_for_each_gpu() -> None:
    script = slurm.build_train_script(workflows.build_spec(["hardware=g5_12xlarge", *workflows.PHOTO_OVERRIDES]))
    assert "#SBATCH --ntasks-per-node=4\n" in script and "#SBATCH --gpus-per-node=4\n" in script
    assert "gpus" not in slurm.build_train_script(shipped())


def test_submit_without_slurm_and_a_rejected_job_say_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^this machine has no sbatch: type the command on a login node"):
        slurm.submit(shipped(), "slurm")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(stat.S_IRWXU)
    with pytest.raises(UserError, match=r"^Slurm rejected the job \(invalid partition .*: x\): type export SBATCH"):
        slurm.submit(shipped(), "slurm-sweep")


# -- processes of srun ---------------------------------------------------------------------------------------------

STEP = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2",
        "SLURM_NODEID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2,1",
        "SLURM_STEP_NODELIST": "gpu[07-08]"}
JOINED = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "gpu07",
          "MASTER_PORT": "20042"}


def test_the_processes_of_a_step_find_each_other() -> None:
    srun.join_step(environment := dict(STEP))
    assert environment == STEP | JOINED
    assert srun.is_other_process(environment) and not srun.is_other_process(environment | {"RANK": "0"})


@pytest.mark.parametrize("change", [{"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0"}])
def test_a_single_task_and_a_process_of_torchrun_are_left_as_they_are(change: dict[str, str]) -> None:
    srun.join_step(environment := STEP | change)
    assert environment == STEP | change
    batch = {key: value for key, value in STEP.items() if "STEP" not in key} | {"SLURM_NTASKS": "4"}
    srun.join_step(environment := dict(batch))  # a command in a batch script or in salloc, without srun
    assert environment == batch and not srun.is_other_process(environment)


@pytest.mark.parametrize("rank, code, expected", [(0, 5, 5), (1, 5, 0), (1, 6, 6)])
def test_srun_kills_no_main_process_that_saves_because_another_one_has_ended(
    rank: int, code: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (STEP | {"RANK": str(rank), "WORLD_SIZE": "3"}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(cli, "_exit_codes", [code])
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as exit_info:
        cli.exit_process()
    assert exit_info.value.code == expected


def test_slurms_notations_of_nodes_are_read() -> None:
    assert [srun.first_host(text) for text in ("a", "a,b", "a1,b[2-3]", "a[003-007,9]-x,b", "a[1,3]")] == [
        "a", "a", "a1", "a003-x", "a1"]
    assert srun.tasks_of_nodes("2(x3),1") == [2, 2, 2, 1]


# -- the launcher's array ------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "image": None, "partition": "gpu", "account": None, "qos": None, "nodes": 1, "tasks_per_node": 1,
    "gpus_per_node": None, "cpus_per_task": 2, "mem_gib": 8, "timeout_min": 60, "max_parallel": 3, "poll_seconds": 1,
    "additional_parameters": {"constraint": "a100"}}


def test_the_array_of_the_launcher_has_the_settings_and_forgets_the_report_of_an_earlier_attempt(
    tmp_path: Path
) -> None:
    (tmp_path / "ends/1").mkdir(parents=True)
    (tmp_path / "ends/1/0.json").write_text("{}")
    tasks = [slurm_array.Task(["train.seed=0"], tmp_path), slurm_array.Task([f"x='{PROMPT}'"], tmp_path)]
    script = slurm_array.build_script(tasks, SETTINGS, tmp_path)
    _, lines = run(script, tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert lines[-1] == f"x='{PROMPT}'" and not list((tmp_path / "ends/1").iterdir())
    options = shlex.split(" ".join(line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")))
    assert {"--partition=gpu", "--mem=8G", "--array=0-1%3", "--constraint=a100", "--requeue"} <= set(options)
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.nodes must be 1 or more, not 0"):
        slurm_array.submit(tasks, SETTINGS | {"nodes": 0}, tmp_path)


def test_a_sweep_waits_for_requeued_jobs_and_knows_why_each_task_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers of squeue: no controller, a preempted job, the end; after some minutes it does not know the job."""
    answers = [(1, "", "Unable to contact slurm controller"), (0, "0 RUNNING\n1 PENDING\n2 COMPLETING", ""),
               (0, "0 COMPLETED\n1 FAILED\n2 OUT_OF_MEMORY\n3 PENDING", ""), (1, "", "Invalid job id specified")]
    outputs = (SimpleNamespace(returncode=code, stdout=out, stderr=err) for code, out, err in answers)
    monkeypatch.setattr(slurm_array.subprocess, "run", lambda *args, **kwargs: next(outputs))
    tasks = [slurm_array.Task([], tmp_path / f"run-{number}") for number in range(4)]
    for number in (0, 3):
        tasks[number].run_dir.mkdir()
        (tasks[number].run_dir / "result.json").write_text(json.dumps({"objective": 0.25}))
    (tmp_path / "ends/1").mkdir(parents=True)
    for rank, meant in ((0, False), (1, True)):
        (tmp_path / f"ends/1/{rank}.json").write_text(json.dumps(
            {"rank": rank, "code": 6 if meant else 1, "sentence": f"process {rank}", "meant": meant}))
    ends = slurm_array.follow("9", tasks, tmp_path, 0)
    assert ends == [slurm_array.End(0.25), slurm_array.End(None, 6, "process 1"), slurm_array.End(
        None, 1, f"the job has no result (Slurm: OUT_OF_MEMORY): see {tmp_path}/2.log"), slurm_array.End(0.25)]


def test_ctrl_c_cancels_the_jobs_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[str] = []

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm_array, "submit", lambda *args: "9")
    monkeypatch.setattr(slurm_array, "follow", interrupted)
    monkeypatch.setattr(slurm_array, "cancel", lambda array, folder: cancelled.append(array))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "tracking": {"sweep": "mine"}})
    with pytest.raises(Interrupted, match="the Slurm job 9 is cancelled, and its runs save their state: repeat the"):
        _core._run(SETTINGS, config, [], [], 0)
    assert cancelled == ["9"]


def test_a_repeated_command_follows_the_jobs_that_a_lost_one_has_submitted(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the new jobs would fail, because the old ones train in the folders of their runs."""
    states: dict[int, str] | None = {0: "COMPLETED", 1: "RUNNING"}
    numbers = iter(["9", "10"])
    followed: list[tuple[str, Path]] = []
    monkeypatch.setattr(slurm_array, "_states", lambda array: states)
    monkeypatch.setattr(slurm, "sbatch", lambda *args: next(numbers))
    monkeypatch.setattr(slurm_array, "follow", lambda array, jobs, folder, poll: followed.append((array, folder)) or [])
    monkeypatch.setattr(_core, "_command", lambda job, overrides, sweep: [])

    def launch(*runs: str, sweep: str = "mine") -> None:
        config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "tracking": {"sweep": sweep}})
        composed = [OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path / name)}}}) for name in runs]
        _core._run(SETTINGS, config, composed, [[] for _ in runs], 0)

    launch("a", "b")
    launch("a", "b", sweep="of another second")
    assert followed == [("9", tmp_path / "slurm-mine/0")] * 2
    states = None
    with pytest.raises(UserError, match="squeue does not answer, and the Slurm job 9 may have these runs: repeat the"):
        launch("a", "b")
    states = {0: "COMPLETED", 1: "FAILED"}
    launch("a", "b")
    assert followed[2:] == [("10", tmp_path / "slurm-mine/0")]


def test_after_ctrl_c_a_repeated_command_waits_until_the_runs_have_saved(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{0: "RUNNING"}, {0: "COMPLETING"}, None, {0: "COMPLETING"}, {0: "CANCELLED"}])
    monkeypatch.setattr(slurm_array, "_states", lambda array: next(answers))
    monkeypatch.setattr(slurm_array.subprocess, "run", lambda *args, **kwargs: None)
    task, folder = slurm_array.Task([], tmp_path / "run"), tmp_path / "slurm-mine/0"
    folder.mkdir(parents=True)
    (folder / "array.json").write_text(json.dumps({"array": "9", "runs": [str(task.run_dir)]}))
    slurm_array.cancel("9", folder)
    assert slurm_array.find_active([task], tmp_path, 0) is None
    assert next(answers, None) is None


def test_a_job_of_a_sweep_has_the_run_folder_of_a_sweep_on_this_machine() -> None:
    """The pattern is passed, not the folder: an absolute path would be stored in the run."""
    job = OmegaConf.create({"hydra": {"sweep": {"dir": "${run_root}", "subdir": "${name}-${identity:sweep}"}}})
    assert _core._command(job, ["train.seed=1", "hydra.verbose=true"], "mine") == [
        "hydra.run.dir=${run_root}/${name}-${identity:sweep}", "tracking.sweep='mine'", "train.seed=1"]
