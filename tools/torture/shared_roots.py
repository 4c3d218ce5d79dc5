"""Run roots that are moved, copied, shared by many processes, or on a file system without flock."""

import json
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from tests.support import faults
from tests.support.runs import KILLED
from tests.support.warm_python import PYTHON
from tools.torture.trial import Place, TortureError, Trial

PROCESSES = 10
TRACKED = ("tracking=mlflow", "tracking.sweep=team")
MACHINES = (1, 2)  # numbers for no_flock.py: two machines that share the run root


def trials() -> list[Trial]:
    """The trials of this file."""
    moved, crowd, lock = "moved or copied run root", "ten processes at once in an empty run root", "no flock"
    return [
        Trial(moved, "moved after kill -9", move, (shutil.move,)),
        Trial(moved, "copied after kill -9", move, (shutil.copytree,)),
        Trial(crowd, "one run", start_one_run),
        Trial(crowd, "ten runs", start_many_runs),
        Trial(lock, "undisturbed", train_without_flock),
        Trial(lock, "kill -9, then on the same machine", kill_without_flock, (MACHINES[0],)),
        Trial(lock, "kill -9, then on another machine", kill_without_flock, (MACHINES[1],)),
        Trial(lock, "two machines at once", compete_without_flock)]


def move(place: Place, transfer: Callable[[Path, Path], object]) -> str:
    """Kill a run, move or copy its root, and complete the run, start another one and promote in the new place."""
    old, new = (replace(place, folder=place.folder / name) for name in ("old", "new"))
    place.folder.mkdir(exist_ok=True)
    if (code := old.train(*TRACKED, fault="random_moment", seed=1)) != KILLED:
        raise TortureError(f"the run was not killed, exit code {code}: {old.sentence()}")
    transfer(old.folder, new.folder)
    before = _files(old.folder)
    outcome = new.repeat(*TRACKED)
    if code := new.train(*TRACKED, "train.seed=1"):
        raise TortureError(f"another run ended with exit code {code}: {new.sentence()}")
    code = faults.call("promote", [f"run_root={new.folder}", "sweep=team", "allow_unmeasured=true"], log=new.log)
    new.check_output(code)
    if code or not list((new.folder / "mlartifacts").glob("*/artifacts/model-*/model_index.json")):
        raise TortureError(f"promote ended with exit code {code}, without a model in the new place: {new.sentence()}")
    if _files(old.folder) != before:
        raise TortureError("the commands in the new place wrote to the old place")
    return f"{outcome}; nothing is written to the old place; " + (
        f"the original is continued, too: {old.repeat(*TRACKED)}" if before else "promoted")


def start_one_run(place: Place) -> str:
    """Start the same command ten times. One process trains, and the others say so, or that the run is finished."""
    codes = [process.wait() for process in [place.start("tracking=mlflow") for _ in range(PROCESSES)]]
    place.check_output(max(codes))
    output = place.output()
    refused = output.count("is training in")
    if set(codes) - {0, 1} or 0 not in codes or refused != codes.count(1):
        raise TortureError(f"exit codes {codes}, of which {refused} say that another process is training")
    return f"{codes.count(0)} trained or found the run finished, {refused} refused with a sentence; {_compared(place)}"


def start_many_runs(place: Place) -> str:
    """Start ten runs that differ in a setting. All of them are trained and tracked; class images are shared."""
    others = [place.start("tracking=mlflow", f"train.seed={seed}") for seed in range(100, 100 + PROCESSES - 1)]
    codes = [process.wait() for process in [place.start("tracking=mlflow"), *others]]
    place.check_output(max(codes))
    with closing(sqlite3.connect(place.folder / "mlflow.db")) as database:
        statuses = [status for (status,) in database.execute("SELECT status FROM runs")]
    if any(codes) or statuses != ["FINISHED"] * PROCESSES:
        raise TortureError(f"exit codes {codes}, runs in MLflow: {statuses}")
    for path in place.folder.glob("*/result.json"):  # `repeat` expects one run
        if json.loads((path.parent / "run.json").read_text())["settings"]["train.seed"] != "0":
            shutil.rmtree(path.parent)
    return f"all trained and tracked; {_compared(place)}"


def train_without_flock(place: Place) -> str:
    """Train without flock."""
    return _completed(place, MACHINES[0])


def kill_without_flock(place: Place, machine: int) -> str:
    """Kill a run on the first machine, and repeat the command on `machine`."""
    process = _start(place, MACHINES[0])
    _wait_for(place, "training 3/")
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    outcome = _completed(place, machine)
    waited = "waiting up to" in place.output()
    if waited != (machine != MACHINES[0]):
        raise TortureError(f"the lock of the killed process expired after {time.monotonic() - began:.0f} s")
    return f"{'the lock expired' if waited else 'continued at once'}; {outcome}"


def compete_without_flock(place: Place) -> str:
    """Start the same command on two machines. One process trains, and the other is refused."""
    first = _start(place, MACHINES[0])
    _wait_for(place, "training 1/")
    second = _start(place, MACHINES[1]).wait()
    code = first.wait()
    place.check_output(code)
    if code != 0 or (second == 1) != ("another process (process" in place.output()) or second not in (0, 1):
        raise TortureError(f"exit codes {code} and {second}: {place.sentence()}")
    return f"exit codes {code} and {second}; {_completed(place, MACHINES[1])}"


def _start(place: Place, machine: int) -> "subprocess.Popen[bytes]":
    """Start the training command on a machine whose file system has no flock, without waiting."""
    arguments = json.dumps([f"run_root={place.folder}", *faults.FAST, *place.settings])
    words = [PYTHON, "-m", "tools.torture.no_flock", str(machine), arguments]
    with place.log.open("ab") as file:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=faults.ROOT)


def _wait_for(place: Place, marker: str) -> None:
    end = time.monotonic() + 120
    while marker not in place.output():
        if time.monotonic() > end:
            raise TortureError(f"the run did not print {marker!r}: {place.sentence()}")
        time.sleep(0.01)


def _completed(place: Place, machine: int) -> str:
    """Run the command on a machine without flock, and compare the run with the reference."""
    code = _start(place, machine).wait()
    place.check_output(code)
    if code:
        raise TortureError(f"exit code {code}: {place.sentence()}")
    return _compared(place)


def _compared(place: Place) -> str:
    """Compare the run, which is finished, with the reference. Return "equal"."""
    return place.repeat("tracking=none")


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
