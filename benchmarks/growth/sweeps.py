"""Measures sweeps of 10, 100 and 1,000 runs in one MLflow: python -m benchmarks.growth.sweeps [--write]

Every command is a process of its own, and its CPU seconds and wall seconds are measured from start to end:

- a sweep in this process, and one with hydra/launcher=sagemaker, whose runs do nothing but leave what a run leaves. Of
  a sweep on SageMaker, every job is composed, checked and built, and submitted to a backend in memory, on which it ends
  at its first poll; the planner is off: it runs once for all jobs that differ in seeds and rates only;
- a study of Optuna, whose jobs are submitted in batches of four (--trials);
- `python -m dreambooth.compare` and `python -m dreambooth.promote` of the sweep.

The folder of each run is a copy of a real run of two steps, with other settings, two objectives and samples. All runs
are in one database of MLflow, to which each is sent as a run sends it.

--overhead N measures a sweep of N real runs of two steps in one process, and commands that make one run each. It also
shows what the sweep adds to its runs: the CPU seconds of the process that belong to none of them. A run consists of
what a command with one run does, too: its configuration is composed once, and its job is executed.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
SIZES = (10, 100, 1000)
SWEEP = "growth"
OBJECTIVES = "[subject_similarity,class_drift]"
SHORT = ["hardware=cpu", "train.max_train_steps=2", "prior.num_class_images=4", "prior.num_inference_steps=1",
         "evaluate.encoder=none", "checkpoint.every=null"]
SAMPLES = ["sample.every=2", "sample.num_inference_steps=1", "sample.images_per_prompt=2"]
LAUNCHER = ["hydra/launcher=sagemaker", "hydra.launcher.role=arn:aws:iam::123456789012:role/dreambooth",
            "hydra.launcher.image=123456789012.dkr.ecr.us-east-1.amazonaws.com/dreambooth:1",
            "hydra.launcher.s3=s3://bucket/sweeps", "hydra.launcher.plan=false", "hydra.launcher.poll_seconds=1",
            "hydra.launcher.instance_type=ml.g4dn.xlarge", "dataset=demo"]
Seconds = tuple[float, float]  # of CPU and of wall time


# -- runs without training ------------------------------------------------------------------------------------------

def result_of(number: int) -> dict[str, Any]:
    """Return the result of the run `number`: scores with a front of some points, as a result.json holds them."""
    draw = random.Random(number)
    strength = draw.random()
    similarity, drift = (0.3 + 0.5 * strength + draw.gauss(0, 0.02), 0.05 + 0.3 * strength**2 + draw.gauss(0, 0.02))
    return {"step": 2, "objective": -similarity, "seconds": 1.0, "model": "model", "exported_step": 2, "scores": {
        "instance_loss": 0.1, "subject_similarity_efficientnet_lite0": similarity,
        "class_drift_efficientnet_lite0": drift,
        "class_similarity_efficientnet_lite0": 0.2, "prompt_fidelity_efficientnet_lite0": 0.9},
        "base_scores": {"class_similarity_efficientnet_lite0": 0.2, "prompt_fidelity_efficientnet_lite0": 0.9},
        "objectives": {"subject_similarity": similarity, "class_drift": drift}, "stopped": None}


def leave_run(template: Path, folder: Path, number: int, settings: dict[str, str], send: bool = True) -> list[float]:
    """Make the folder of the run `number` from that of a real run, and send it to MLflow. Return its objectives."""
    from dreambooth.tracking.tracker import open_tracker

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "samples"):
        shutil.copytree(template / name, folder / name, copy_function=os.link)
    for name in ("contact_sheet.png", "curves.svg"):
        with suppress(FileNotFoundError):
            os.link(template / name, folder / name)
    run = json.loads((template / "run.json").read_text("utf-8"))
    run["settings"] |= settings | {"evaluate.encoder": "efficientnet_lite0",
                                   "evaluate.objective": "subject_similarity,class_drift"}
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    result = result_of(number)
    (folder / "result.json").write_text(json.dumps(result), "utf-8")
    lines = (template / "metrics.jsonl").read_text("utf-8").splitlines()
    tags = json.dumps({"time": time.time_ns() // 10**6, "tags": {"sweep": SWEEP, "kind": "trial"}})
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], tags, *lines[1:], ""]), "utf-8")
    if send:
        open_tracker("mlflow", folder, run_root=folder.parent, run_name=folder.name,
                     update_status=False).close("FINISHED")
    return list(result["objectives"].values())


def train_nothing(template: Path, cfg: Any, run_dir: Path, sweep: bool) -> list[float]:
    """Take the place of train._job."""
    return leave_run(template, run_dir, cfg.train.seed, {
        "train.seed": str(cfg.train.seed), "train.learning_rate": str(cfg.train.learning_rate)})


class Timer:
    """CPU seconds of this process in some functions, and the number of their calls."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {}

    @contextmanager
    def measured(self, module: Any, name: str) -> Iterator[None]:
        """Context manager that measures a function of a module or class."""
        original, seconds = getattr(module, name), self.calls.setdefault(name, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                seconds.append(time.process_time() - began)

        with patch.object(module, name, timed):
            yield


# -- processes ------------------------------------------------------------------------------------------------------

def run_sweep(words: Sequence[str]) -> None:
    """Run the command train in this process."""
    from dreambooth import train

    sys.argv = ["dreambooth/train.py", "-m", *words]
    train.main()


def local_worker(template: Path, words: Sequence[str]) -> None:
    """Run a sweep in this process, whose runs train nothing."""
    from dreambooth import train

    with patch.object(train, "_job", partial(train_nothing, template)):
        run_sweep(words)


def sagemaker_worker(words: Sequence[str]) -> None:
    """Run a sweep whose jobs are submitted to a backend in memory."""
    from dreambooth.cloud import follower, sagemaker_backend
    from dreambooth.cloud.job import COMPLETED, RUNNING, Job, JobState
    from hydra_plugins.dreambooth_sagemaker import _core

    class Backend(sagemaker_backend.SageMakerBackend):
        """Checks requests as ever; a job has ended when it is polled first."""

        def submit(self, job: Job) -> JobState:
            return JobState(RUNNING, "Training")

        def poll(self, job: Job) -> JobState:
            return JobState(COMPLETED, billed_seconds=60.0, result=result_of(job.number))

    with patch.object(_core, "SageMakerBackend", Backend), \
            patch.object(_core, "Follower", partial(follower.Follower, sleep=lambda seconds: None)):
        run_sweep(words)


def overhead_worker(out: Path, words: Sequence[str]) -> None:
    """Run a sweep of real runs; write what was measured to `out`."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.plugins import Plugins

    Plugins.instance()  # it imports the modules of all plugins once more, and this is the one that launches
    basic_launcher = sys.modules["hydra._internal.core_plugins.basic_launcher"]
    timer = Timer()
    try:
        with timer.measured(basic_launcher, "run_job"), timer.measured(ConfigLoaderImpl, "load_sweep_config"):
            run_sweep(words)
    finally:
        out.write_text(json.dumps(timer.calls | {"process": time.process_time()}), "utf-8")


def measure(words: Sequence[str], log: Path) -> Seconds:
    """Run a Python process. Return its seconds, those of its children included.

    Raises:
        SystemExit: it has failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "none",
                                "AWS_SECRET_ACCESS_KEY": "none", "PYTHONPATH": str(ROOT)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, "-m", *words], cwd=log.parent, env=environment, stdout=file, stderr=file,
                              check=False).returncode
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {code}:\n{log.read_text('utf-8')[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def worker(name: str, *words: str) -> list[str]:
    return ["benchmarks.growth.sweeps", "--worker", name, *words]


def measure_size(count: int, template: Path, folder: Path, trials: bool) -> dict[str, Seconds]:
    """Measure all commands with `count` runs."""
    folder.mkdir(parents=True)
    seeds = f"train.seed=range(1,{count + 1})"
    local = worker("local", str(template), f"run_root={folder}/runs", f"tracking.sweep={SWEEP}", "hardware=cpu",
                   f"evaluate.objective={OBJECTIVES}", seeds)
    seconds = {
        "sweep, local": measure(local, folder / "local.log"),
        "sweep, SageMaker": measure(worker("sagemaker", *LAUNCHER, f"run_root={folder}/cloud",
                                           f"hydra.launcher.sweep={SWEEP}", "hydra.launcher.max_parallel=10",
                                           f"evaluate.objective={OBJECTIVES}", seeds), folder / "cloud.log")}
    if trials:
        seconds["study, SageMaker"] = measure(worker(
            "sagemaker", *LAUNCHER, f"run_root={folder}/study", f"hydra.launcher.sweep={SWEEP}", "hydra/sweeper=optuna",
            "hydra/sweeper/sampler=random", f"hydra.sweeper.n_trials={count}", "hydra.sweeper.n_jobs=4",
            f"evaluate.objective={OBJECTIVES}", "train.learning_rate=tag(log,interval(1e-5,1e-3))"),
            folder / "study.log")
    sweep = [f"sweep={SWEEP}", f"run_root={folder}/runs"]
    seconds["compare"] = measure(["dreambooth.compare", *sweep], folder / "compare.log")
    seconds["promote"] = measure(["dreambooth.promote", *sweep, "rule=class_drift<=0.3"], folder / "promote.log")
    return seconds


def growth_rows(measured: dict[int, dict[str, Seconds]]) -> Iterator[str]:
    """Yield the rows of a table: CPU seconds of each command by number of runs, and the seconds of one more run."""
    counts = sorted(measured)
    yield f"| CPU seconds (wall seconds) | {' | '.join(f'{count:,} runs' for count in counts)} | one more run, ms |"
    yield f"|---{'|---' * (len(counts) + 1)}|"
    for name in measured[counts[0]]:
        cells = [f"{measured[count][name][0]:.1f} ({measured[count][name][1]:.1f})" for count in counts]
        slopes = [(measured[last][name][0] - measured[first][name][0]) / (last - first) * 1000
                  for first, last in pairwise(counts)]
        yield f"| {name} | {' | '.join(cells)} | {', then '.join(f'{slope:.1f}' for slope in slopes) or '-'} |"


def overhead_rows(count: int, folder: Path) -> Iterator[str]:
    """Yield rows about a sweep of `count` real runs of two steps, and about what it adds to them."""
    folder.mkdir(parents=True)
    out, words = folder / "seconds.json", [*SHORT, "sample.every=null"]
    sweep, _ = measure(worker("overhead", str(out), f"run_root={folder}/runs", f"tracking.sweep={SWEEP}", *words,
                              f"train.seed=range(1,{count + 1})"), folder / "overhead.log")
    calls = json.loads(out.read_text("utf-8"))
    commands = [measure(["dreambooth.train", f"run_root={folder}/alone", *words, f"train.seed={number}"],
                        folder / "command.log")[0] for number in range(4)]
    yield from describe_overhead(count, sweep, calls["process"], calls["run_job"], calls["load_sweep_config"],
                                 commands[1:])


def describe_overhead(count: int, sweep: float, process: float, runs: list[float], composed: list[float],
                      commands: list[float], more: int = 1000) -> Iterator[str]:
    """Yield the rows of a table about a sweep of `count` runs in one process. All times are CPU seconds.

    Args:
        sweep: duration of the whole sweep, from the start of the process to its end.
        process: the part of it until the last run and the summary have ended.
        runs: durations of its runs. The first one includes imports and class images.
        composed: durations of composing the configuration of a run. The sweep does it for each run before the first
            run, to check it, and the run does it once more.
        commands: durations of commands that make one run. The class images exist.
        more: the number of runs of an extrapolation.
    """
    compose, command = median(composed), median(commands)
    all_runs = sum(runs) + count * compose
    one, rest = median(runs[1:]) + compose, process - all_runs
    long = rest / count / 0.01
    yield f"| {count} runs of two steps | CPU s |"
    yield "|---|---|"
    yield f"| one run, median without the first | {one:.2f} |"
    yield f"| {count} runs | {all_runs:.1f} |"
    yield f"| what the sweep adds to them | {rest:.2f} ({rest / all_runs:.1%}) |"
    yield f"| of that, composing every configuration before the first run | {count * compose:.2f} |"
    yield f"| the whole sweep | {sweep:.1f} |"
    yield (f"| {count} commands with one run each ({len(commands)} measured, median {command:.1f}) "
           f"| {count * command:.0f} |")
    yield ""
    extrapolated = sweep + (more - count) * (one + rest / count)
    yield (f"Extrapolated, a sweep of {more:,} such runs takes {extrapolated:,.0f} CPU seconds, and {more:,} commands "
           f"{more * command:,.0f}. A sweep adds 1 % or less to runs of {long:.0f} CPU seconds or more.")


def make_template(folder: Path) -> Path:
    """Train a real run of two steps, and return its folder."""
    folder.mkdir(parents=True)
    measure(["dreambooth.train", f"run_root={folder}/runs", *SHORT, *SAMPLES], folder / "template.log")
    [path] = (folder / "runs").glob("demo-*")
    return path


WORKERS: dict[str, Callable[..., None]] = {
    "local": lambda template, *words: local_worker(Path(template), words),
    "sagemaker": lambda *words: sagemaker_worker(words),
    "overhead": lambda out, *words: overhead_worker(Path(out), words)}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        WORKERS[sys.argv[2]](*sys.argv[3:])
        return
    from benchmarks.speed_table import describe_machine, write_section

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="numbers of runs")
    parser.add_argument("--trials", action="store_true", help="measure a study of Optuna, too")
    parser.add_argument("--overhead", type=int, metavar="N", help="measure a sweep of N real runs, too")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/growth.md")
    options = parser.parse_args()
    if options.overhead is not None and options.overhead < 2:
        parser.error("--overhead needs 2 runs or more")

    def finish(section: str, rows: list[str]) -> None:
        rows = [describe_machine(1), "", *rows]
        print("\n".join(rows), flush=True)
        if options.write:
            write_section(section, rows, "growth.md")

    with tempfile.TemporaryDirectory() as name:
        folder, measured = Path(name), dict[int, dict[str, Seconds]]()
        template = make_template(folder / "template") if options.sizes else folder
        for count in options.sizes:
            measured[count] = measure_size(count, template, folder / str(count), options.trials)
            print(count, measured[count], flush=True)
            shutil.rmtree(folder / str(count))
        if measured:
            finish("sweeps", list(growth_rows(measured)))
        if options.overhead:
            finish("overhead", list(overhead_rows(options.overhead, folder / "overhead")))


if __name__ == "__main__":
    main()
