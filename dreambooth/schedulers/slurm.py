"""Builds batch scripts for Slurm, and submits them: a check of all runs, one run, and a sweep as a job array.

Slurm sends SIGTERM to the processes of a job that it preempts, cancels or stops at the time limit. A run then saves its
state and ends with exit code 5. Slurm queues a preempted job again by itself, but not if the job ends in its grace time
(GraceTime of a partition, https://slurm.schedmd.com/preempt.html), and not at the time limit. The script therefore
queues its job again if a run ends with exit code 5 while Slurm calls the job running. A job that is preempted without
grace time, or cancelled, is not called running at that moment.
"""

import math
import re
import subprocess
from collections.abc import Sequence
from shlex import quote

from dreambooth.config.compose import name_trial
from dreambooth.config.enums import Device
from dreambooth.errors import Interrupted, UserError
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import TRACKING_OVERRIDE, TRIAL_RUN_DIR, WorkflowSpec
from dreambooth.utils.quoting import hydra_string

CHECK, TRAIN, SWEEP = "slurm/check.sbatch", "slurm/train.sbatch", "slurm/sweep.sbatch"
KINDS = {"slurm": TRAIN, "slurm-sweep": SWEEP}  # what `workflows submit` offers, and the script of each
HEADER = "# Written from conf/ by python -m dreambooth.workflows render, which overwrites what is changed here.\n"
PARALLEL = 4  # tasks of a job array that run at a time
CPUS = 2  # of each process
GRACE = 120  # seconds between SIGTERM and the time limit, as in pods
RESTART = {"open-mode": "append", "requeue": "", "signal": f"TERM@{GRACE}"}  # options of sbatch for a job that trains
USAGE = """\
# Variables, as in sbatch --export=ALL,IMAGE=REGISTRY#NAME:TAG FILE:
#   RUN_ROOT  folder of all runs, which all nodes can write to; default: runs, in the folder where you type sbatch
#   IMAGE     container image, for nodes with enroot and pyxis; default: none, the environment that is active at sbatch
# shellcheck disable=SC2016  # Hydra replaces ${{...}} in quotes, not this shell
"""
SETUP = """\
set -euo pipefail
run_root=${RUN_ROOT:-$PWD/runs}
mkdir -p "$run_root"
export HF_HOME=${HF_HOME:-$run_root/huggingface} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
srun=(srun --kill-on-bad-exit=1)
if [[ -n ${IMAGE-} ]]; then
    srun+=(--container-image="$IMAGE" --container-mounts="$PWD:$PWD,$run_root:$run_root"
           --container-workdir="$PWD" --no-container-entrypoint)
fi
"""
RUN = f"""\
trap : TERM  # Slurm also signals this shell, which must wait until the run has saved its state
code=0
"${{srun[@]}}" python -m dreambooth.train "${{overrides[@]}}" || code=$?
job=$SLURM_JOB_ID
if [[ -n ${{SLURM_ARRAY_TASK_ID-}} ]]; then job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID; fi  # one task
if (( code == {Interrupted.exit_code} )) && [[ $(squeue -h -j "$job" -o %T) == RUNNING ]]; then
    scontrol requeue "$job"  # the grace time of a preemption, or the time limit
fi
exit "$code"
"""


def render_scripts(spec: WorkflowSpec) -> dict[str, str]:
    """Return the content of all batch scripts, by path relative to workflows/."""
    return {CHECK: build_check_script(spec), TRAIN: build_train_script(spec), SWEEP: build_sweep_script(spec)}


def build_check_script(spec: WorkflowSpec) -> str:
    """Build the job that composes and plans every run of the other two scripts, without a GPU.

    It fails if a run has wrong settings or does not fit. It is the stage `validate` of the other workflow engines.
    """
    options = {"job-name": "dreambooth-check", "nodes": "1", "ntasks": "1", "cpus-per-task": str(CPUS), "mem": "6G",
               "time": "00:30:00", "output": "dreambooth-check-%j.log"}
    command = ('"${srun[@]}" python -m dreambooth.stage validate --out "/tmp/dreambooth-stage-$SLURM_JOB_ID" '
               f'--space {quote(spec.space.name)} "${{overrides[@]}}"\n')
    return _script(spec, options, command)


def build_train_script(spec: WorkflowSpec) -> str:
    """Build the job of one run. It has one process per GPU; with `sbatch --nodes=2`, the processes of two nodes."""
    return _script(spec, _options(spec, "dreambooth", "%j"), RUN)


def build_sweep_script(spec: WorkflowSpec) -> str:
    """Build the job array of a sweep, with one task per point of the search space."""
    trials = spec.space.trials()
    options = _options(spec, f"dreambooth-{spec.space.name}", "%A-%a") | {"array": f"0-{len(trials) - 1}%{PARALLEL}"}
    names = f'overrides+=("tracking.sweep=slurm-$SLURM_ARRAY_JOB_ID" {quote(TRIAL_RUN_DIR)})\n'
    return _script(spec, options, names, choose_trial(
        [[f"tracking.run_name={hydra_string(name_trial(trial))}", *trial] for trial in trials]), RUN)


def choose_trial(trials: Sequence[Sequence[str]]) -> str:
    """Return the lines that add the overrides of a task of a job array to the overrides of its run."""
    cases = "".join(f"{number}) overrides+=({_words(trial)}) ;;\n" for number, trial in enumerate(trials))
    return f"case $SLURM_ARRAY_TASK_ID in\n{cases}esac\n"


def _options(spec: WorkflowSpec, name: str, number: str) -> dict[str, str]:
    """Return the options of sbatch for a job that trains, by name; a user's options of sbatch take precedence."""
    hardware = spec.hardware
    memory = math.floor((hardware.host_ram_gib or 8) * pod_spec.MEMORY_SHARE)
    gpus = {} if hardware.device is Device.cpu else {"gpus-per-node": str(hardware.gpus)}
    processes = 1 if hardware.device is Device.cpu else hardware.gpus
    return {"job-name": name, "nodes": "1", "ntasks-per-node": str(processes), "cpus-per-task": str(CPUS), **gpus,
            "mem": f"{memory}G", "time": "1-00:00:00", "output": f"{name}-{number}.log", **RESTART}


def _words(words: Sequence[str]) -> str:
    return " ".join(map(quote, words))


def _script(spec: WorkflowSpec, options: dict[str, str], *parts: str) -> str:
    overrides = f'overrides=({_words([*spec.overrides, TRACKING_OVERRIDE])} "run_root=$run_root")\n'
    return f"{heading(options, HEADER)}{USAGE.format()}{SETUP}{overrides}{''.join(parts)}"


def heading(options: dict[str, str], comment: str = "") -> str:
    """Return the first lines of a batch script, with the options of sbatch by name."""
    lines = "".join(f"#SBATCH --{key}{f'={value}' if value else ''}\n" for key, value in options.items())
    return f"#!/bin/bash\n{comment}{lines}"


def submit(spec: WorkflowSpec, kind: str, name: str | None = None) -> str:
    """Submit a batch script with sbatch, and return a sentence that names the job.

    Args:
        kind: one of KINDS.
        name: name of the job; None: the name in the script.

    Raises:
        UserError: this machine has no sbatch, or Slurm rejects the job.
    """
    script = (build_train_script if KINDS[kind] == TRAIN else build_sweep_script)(spec)
    advice = "type export SBATCH_PARTITION=NAME or export SBATCH_ACCOUNT=NAME, then repeat the command"
    return f"Slurm job {sbatch(script, advice, name)}"


def sbatch(script: str, advice: str, name: str | None = None) -> str:
    """Submit a batch script, and return the number of the job.

    Args:
        advice: what to type if Slurm rejects the job.
        name: name of the job; None: the name in the script.

    Raises:
        UserError: this machine has no sbatch, or Slurm rejects the job.
    """
    command = ["sbatch", "--parsable", *([f"--job-name={name}"] if name else [])]
    try:
        result = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("this machine has no sbatch: type the command on a login node of the Slurm cluster") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [""]
        reason = re.sub("^sbatch: (error: )?", "", lines[-1])
        raise UserError(f"Slurm rejected the job ({reason}): {advice}")
    return result.stdout.strip().partition(";")[0]
