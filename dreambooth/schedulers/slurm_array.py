"""Submits the jobs of a sweep as a job array of Slurm, and follows them. The Hydra launcher uses it."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from dreambooth.config.evaluate import read_objective
from dreambooth.errors import EXIT_REPORT_DIR, ConfigError, Interrupted, UserError, choose_report
from dreambooth.schedulers import slurm
from dreambooth.utils import atomic_files

ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
          "SIGNALING", "STAGE_OUT", "STOPPED", "PREEMPTED"}  # https://slurm.schedmd.com/squeue.html, "job state codes"
UNKNOWN_JOB = "Invalid job id"  # squeue, some minutes after the end of a job
ARRAY = "array.json"  # number of the job array, and the folders of its runs
REPORTS = "ends"  # folder of the exit reports, one folder for each task


@dataclass(frozen=True)
class Task:
    """One job of a sweep: the overrides of `python -m dreambooth.train`, and the folder of its run."""

    overrides: Sequence[str]
    run_dir: Path


@dataclass(frozen=True)
class End:
    """How a task ended: its objective (or several), or None with an exit code above 0 and a reason in one sentence."""

    objective: float | list[float] | None
    code: int = 0
    reason: str = ""


def submit(tasks: Sequence[Task], settings: Mapping[str, Any], folder: Path) -> str:
    """Submit the tasks as one job array, and return the number of the job.

    Args:
        settings: the settings of conf/hydra/launcher/slurm.yaml.
        folder: RUN_ROOT/SWEEP/BATCH, for the logs and exit reports.

    Raises:
        ConfigError: a setting has a value that is not possible.
        UserError: this machine has no sbatch, or Slurm rejects the job.
    """
    rules = {f"hydra.launcher.{key} must be 1 or more, not {settings[key]}": settings[key] >= 1 for key in (
        "nodes", "tasks_per_node", "cpus_per_task", "max_parallel", "poll_seconds")}
    rules["hydra.launcher.timeout_min must be 5 or more: Slurm stops a run two minutes before it"] = (
        settings["timeout_min"] >= 5)
    if problems := [problem for problem, holds in rules.items() if not holds]:
        raise ConfigError(*problems)
    folder.mkdir(parents=True, exist_ok=True)
    array = slurm.sbatch(build_script(tasks, settings, folder),
                         "type the settings of your cluster, such as hydra.launcher.partition=NAME")
    atomic_files.write_json(folder / ARRAY, {"array": array, "runs": [str(task.run_dir) for task in tasks]})
    return array


def find_active(tasks: Sequence[Task], root: Path, poll_seconds: float) -> tuple[str, Path] | None:
    """Return the number and the folder of a job array with these runs that has not ended; None: there is none.

    A command that was killed, or whose terminal was closed, leaves its job array behind. A job array that was cancelled
    is not returned: this function waits until its runs have saved their state.

    Args:
        root: the folder that contains the folders of sweeps.

    Raises:
        UserError: Slurm does not answer, so that it is unknown whether the job array has ended.
    """
    runs = [str(task.run_dir) for task in tasks]
    for path in sorted(root.glob(f"slurm-*/*/{ARRAY}")):
        record = atomic_files.read_object(path) or {}
        if record.get("runs") != runs:
            continue
        array = str(record.get("array"))
        if (states := _states(array)) is None:
            raise UserError(f"squeue does not answer, and the Slurm job {array} may have these runs: repeat the "
                            "command when it does")
        if ACTIVE.intersection(states.values()):
            if not record.get("cancelled"):
                return array, path.parent
            print(f"waiting for the cancelled Slurm job {array}, whose runs save their state", flush=True)
            while states is None or ACTIVE.intersection(states.values()):
                time.sleep(poll_seconds)
                states = _states(array)
    return None


def build_script(tasks: Sequence[Task], settings: Mapping[str, Any], folder: Path) -> str:
    """Build the batch script of the job array. Each task is requeued as in the scripts of workflows/slurm."""
    optional = {"partition": settings["partition"], "account": settings["account"], "qos": settings["qos"],
                "gpus-per-node": settings["gpus_per_node"],
                "mem": f"{settings['mem_gib']}G" if settings["mem_gib"] else None}
    options = {"job-name": "dreambooth-sweep", "nodes": settings["nodes"],
               "ntasks-per-node": settings["tasks_per_node"], "cpus-per-task": settings["cpus_per_task"],
               "time": settings["timeout_min"], "array": f"0-{len(tasks) - 1}%{settings['max_parallel']}",
               "output": quote(f"{folder}/%a.log"), **slurm.RESTART,
               **{key: value for key, value in optional.items() if value is not None},
               **settings["additional_parameters"]}
    python = "python" if settings["image"] else quote(sys.executable)
    report = (f"export {EXIT_REPORT_DIR}={quote(str(folder / REPORTS))}/$SLURM_ARRAY_TASK_ID\n"
              f'rm -rf "${EXIT_REPORT_DIR}"; mkdir -p "${EXIT_REPORT_DIR}"\n')  # of an interrupted attempt
    variables = f"IMAGE={quote(settings['image'] or '')}\nRUN_ROOT={quote(str(folder.parents[1]))}\n"  # not the shell's
    return "".join([
        slurm.heading({key: str(value) for key, value in options.items()}), variables, slurm.SETUP, "overrides=()\n",
        slurm.choose_trial([task.overrides for task in tasks]), report, slurm.RUN.replace(" python ", f" {python} ")])


def follow(array: str, tasks: Sequence[Task], folder: Path, poll_seconds: float) -> list[End]:
    """Wait until all tasks of a job array have ended, and return how each of them ended."""
    states: dict[int, str] = {}  # of tasks that have ended
    while len(states) < len(tasks):
        time.sleep(poll_seconds)
        known = _states(array)
        ended = {number: known.get(number, "") for number in range(len(tasks))} if known is not None else {}
        for number, state in ended.items():
            if state not in ACTIVE and number not in states:
                states[number] = state
                print(f"task {number}: {_describe(_end(tasks[number], folder, number, state))}", flush=True)
    return [_end(task, folder, number, states[number]) for number, task in enumerate(tasks)]


def cancel(array: str, folder: Path) -> None:
    """Cancel a job array. Its runs receive SIGTERM and save their state.

    Args:
        folder: see `submit`.
    """
    if record := atomic_files.read_object(folder / ARRAY):
        atomic_files.write_json(folder / ARRAY, record | {"cancelled": True})
    subprocess.run(["scancel", array], capture_output=True, check=False)


def _states(array: str) -> dict[int, str] | None:
    """Return the states of the tasks that Slurm still knows, by number; None if Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%K %T", f"--jobs={array}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return {} if UNKNOWN_JOB in result.stderr else None
    pairs = (line.split() for line in result.stdout.splitlines())
    return {int(pair[0]): pair[1] for pair in pairs if len(pair) == 2 and pair[0].isdecimal()}


def _end(task: Task, folder: Path, number: int, state: str) -> End:
    """Return how a task ended, from the exit reports of its processes, or else from the result of its run."""
    paths = sorted((folder / REPORTS / str(number)).glob("*.json"))
    if reports := [report for path in paths if (report := atomic_files.read_object(path))]:
        chosen = choose_report(reports)
        return End(None, int(chosen["code"]), str(chosen["sentence"]))
    if (value := read_objective(atomic_files.read_object(task.run_dir / "result.json") or {})) is not None:
        return End(value)
    # A task that is cancelled while it waits in the queue has no report.
    code = Interrupted.exit_code if state.startswith("CANCELLED") else UserError.exit_code
    return End(None, code, f"the job has no result (Slurm: {state or 'unknown state'}): see {folder / f'{number}.log'}")


def _describe(end: End) -> str:
    values = end.objective if isinstance(end.objective, list) else [end.objective] if end.objective is not None else []
    return f"objective {', '.join(json.dumps(round(value, 6)) for value in values)}" if values else end.reason
