"""Runs trainers, one process at a time, and measures speed, memory, checkpoints and resuming."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from process_monitor import CommandFailed, ProcessUsage, run_monitored
from speed_table import Trial
from timings import class_rate, step_end_times, step_rate

from peers.tasks import Job, NotSupported, Task, Trainer, interpreter, size_bytes

RESUME_STEPS = 2  # steps before the checkpoint, and after it
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of text on a terminal
MAX_REASON = 160  # characters of an error in the table


def run_trial(trainer: Trainer, environment: Path | None, task: Task, trial: Trial, work: Path, timeout: float,
              with_resume: bool, new_class_images: int = 0) -> Trial:
    """Return `trial` with its measurements. A trainer that fails gives a trial with its error and no measurements.

    Args:
        environment: the environment of a peer; None: that of this process.
        timeout: seconds after which a process is ended.
        with_resume: whether to measure a checkpoint, and the time until the first step after it, too.
        new_class_images: class images to generate before one step; 0: the case uses given ones.
    """
    out = work / "out" / trainer.name.replace(" ", "_")
    shutil.rmtree(out, ignore_errors=True)
    job = Job(task, work, out, work / "notes.jsonl", 1 if new_class_images else task.steps,
              new_class_images=new_class_images)

    def run(job: Job) -> ProcessUsage:
        return run_job(trainer, environment, job, trial.threads, timeout)

    try:
        usage = run(job)
        clock, ends = usage.cpu_seconds_until, step_end_times(trainer.step_log(job))
        if len(ends) < min(2, job.steps):
            raise CommandFailed(f"its log has the end of {len(ends)} steps")
        trial = replace(
            trial, images_per_second=step_rate(ends, task.images), images_per_cpu=step_rate(ends, task.images, clock),
            first_step_s=ends[0] - usage.started, first_step_cpu=clock(ends[0]), peak_rss_gib=usage.peak_rss_gib,
            cpu_seconds=usage.cpu_seconds, settings=trainer.call(job).settings)
        if new_class_images:
            return replace(trial, class_images_per_second=class_rate(out),
                           class_images_per_cpu=class_rate(out, clock))
    except NotSupported as error:
        return replace(trial, error=str(error))
    except CommandFailed as error:
        return replace(trial, error=reason_of(error.output))
    try:
        return measure_resume(trainer, job, run, trial) if with_resume else trial
    except CommandFailed as error:
        return replace(trial, note=f"does not resume: {reason_of(error.output)}")


def measure_resume(trainer: Trainer, job: Job, run: Callable[[Job], ProcessUsage], trial: Trial) -> Trial:
    """Return the trial with the size of a checkpoint and the seconds until the first step of a resumed process."""
    shutil.rmtree(job.out, ignore_errors=True)
    run(job.with_steps(RESUME_STEPS, RESUME_STEPS, False))
    if (checkpoint := trainer.checkpoint(job.out)) is None:
        return replace(trial, note="writes no checkpoint")
    trial = replace(trial, checkpoint_bytes=size_bytes(checkpoint))
    resumed = job.with_steps(2 * RESUME_STEPS, RESUME_STEPS, True)
    usage = run(resumed)
    ends = [end for end in step_end_times(trainer.step_log(resumed)) if end > usage.started]
    return replace(trial, resume_s=ends[0] - usage.started if ends else None)


def run_job(trainer: Trainer, environment: Path | None, job: Job, threads: int, timeout: float) -> ProcessUsage:
    """Run one process of a trainer.

    Raises:
        NotSupported: the trainer has no command for the task.
        CommandFailed: the process failed, or did not end in `timeout` seconds.
    """
    job.log.unlink(missing_ok=True)
    job.out.mkdir(parents=True, exist_ok=True)
    call = trainer.call(job)
    return run_monitored([interpreter(environment), *call.command], call.folder,
                         os.environ | {"OMP_NUM_THREADS": str(threads)} | call.environment,
                         job.work / f"{trainer.name.replace(' ', '_')}.log", timeout)


def reason_of(message: str) -> str:
    """Return the line of a failed process's output that says why it failed, in at most MAX_REASON characters."""
    lines = [line.strip() for line in COLOURS.sub("", message).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("Exception")]
    line = (errors or lines)[-1].replace("|", "/")
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON - 3]}..."
