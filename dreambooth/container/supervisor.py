"""Runs a command as a child process, forwards signals to it, and reports why it ended."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from dreambooth.errors import EXIT_REPORT_DIR, Interrupted, choose_report
from dreambooth.utils import atomic_files

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_INTERVAL = 0.2  # seconds
STOPPED_EARLY = "stopped before the first step; start the job again to continue"


@dataclass(frozen=True)
class ExitStatus:
    """The exit code of a command, and the reason if the command failed."""

    code: int = 0
    message: str = ""  # the reason of a failure; empty if the code is 0


class Supervisor:
    """Runs the commands of a job, and forwards the container's signals to the training processes.

    If a child process is killed because memory ran out, the supervisor is still running and reports the cause. Each
    child process runs in its own session. Ctrl-C in a terminal therefore reaches a child process only once, through the
    supervisor.
    """

    def __init__(self) -> None:
        self._signals: list[int] = []  # signals received so far
        for number in FORWARDED_SIGNALS:
            signal.signal(number, self._record_signal)

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def run(self, command: Sequence[str], environment: Mapping[str, str], launcher: bool = False,
            stopped: str = STOPPED_EARLY) -> ExitStatus:
        """Run a command, wait until it has ended, and return its exit status. Forward each signal once.

        Args:
            environment: environment variables that are added to those of this process.
            launcher: whether the command is container/torchrun.py. If so, signals are sent to the worker processes and
                not to the launcher, because PyTorch's launcher stops its workers one after the other.
            stopped: message that is reported if a signal arrives before the command starts. It is also reported if a
                signal ends the command before the command has written an exit report.
        """
        if self._signals:
            return self._report_interruption(stopped)
        with tempfile.TemporaryDirectory() as folder:
            variables = {**os.environ, **environment, EXIT_REPORT_DIR: folder}
            child = subprocess.Popen(command, env=variables, start_new_session=True)
            forwarded = 0
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = child.wait(POLL_INTERVAL)
                    signed_code = 128 - code if launcher and code > 128 else code
                    return self._exit_status(signed_code, Path(folder), stopped)
                if forwarded < len(self._signals):
                    _send_signal(child.pid, self._signals[forwarded], launcher)
                    forwarded += 1

    def _exit_status(self, code: int, folder: Path, stopped: str = STOPPED_EARLY) -> ExitStatus:
        """Return the exit status of a child process. Print the reason of a failure if no process has reported it.

        Args:
            code: exit code of the child process; -N if signal N ended it.
            folder: folder with the exit reports, which cli.py writes in the child and in its worker processes.
        """
        reports = [report for path in sorted(folder.glob("[0-9]*.json")) if (report := _read_report(path))]
        # A killed process writes no report, and the reports of other processes describe only consequences.
        if code and reports and code != -signal.SIGKILL:
            chosen = choose_report(reports)
            return ExitStatus(chosen["code"], chosen["sentence"])
        if code < 0 and -code in self._signals:
            return self._report_interruption(stopped)
        if code < 0:
            name = signal.Signals(-code).name
            advice = ": most likely host memory ran out; use a larger instance" if -code == signal.SIGKILL else ""
            return _report(128 - code, f"a process of the job was killed by {name}{advice}")
        if code:
            return _report(code, f"the job ended with exit code {code}: see its log for the reason")
        return ExitStatus()

    def _report_interruption(self, message: str) -> ExitStatus:
        return _report(Interrupted.exit_code, f"{signal.Signals(self._signals[0]).name}: {message}")


def _read_report(path: Path) -> dict[str, Any] | None:
    """Read the exit report that a process has written to a file.

    Return None if the file contains no complete report, for example because the disk was full.
    """
    report = atomic_files.read_object(path)
    return report if report and {"rank", "code", "sentence", "meant"} <= report.keys() else None


def _report(code: int, message: str) -> ExitStatus:
    """Print a message, and return the exit status with this message."""
    print(f"dreambooth: {message}", file=sys.stderr)
    return ExitStatus(code, message)


def _send_signal(pid: int, number: int, launcher: bool) -> None:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        workers = [child.pid for child in psutil.Process(pid).children()] if launcher else []
        for target in workers or [pid]:
            os.kill(target, number)
