"""Runs a command as a child process, forwards signals to it, and reports how it ended, even if it was killed."""

import json
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

import psutil

from dreambooth.errors import EXIT_REPORT_DIR, Interrupted

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_INTERVAL = 0.2  # seconds
STOPPED_EARLY = "stopped before the first step; start the job again to continue"


@dataclass(frozen=True)
class ExitStatus:
    """How a command ended."""

    code: int = 0
    message: str = ""  # the reason of a failure; empty if the code is 0


class Supervisor:
    """Runs the commands of a job, and forwards the container's signals to the training processes.

    If a child process is killed because memory ran out, the supervisor survives and reports it. Each child runs in its
    own session, so that Ctrl-C in a terminal reaches the child once, through the supervisor.
    """

    def __init__(self) -> None:
        self._signals: list[int] = []  # received so far
        for number in FORWARDED_SIGNALS:
            signal.signal(number, self._record_signal)

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def run(self, command: Sequence[str], environment: Mapping[str, str], launcher: bool = False,
            stopped: str = STOPPED_EARLY) -> ExitStatus:
        """Run a command and wait for its end; forward each signal once.

        Args:
            launcher: whether the command is container/torchrun.py. If so, signals are sent to its worker processes and
                not to the launcher itself, because PyTorch's launcher stops its workers one after the other.
            stopped: message for a signal that arrives before the command starts, or that ends the command before the
                command can write its own report.
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
        """Return the exit status of a child process.

        Args:
            code: exit code, negative for a signal.
            folder: contains the exit reports that the child's processes wrote (in cli.py).
        """
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        # A killed process writes no report, and reports of the others only describe the consequences.
        if code and reports and code != -signal.SIGKILL:
            # Processes that wait for the failed one report internal errors: prefer a user-facing error ("meant").
            report = min(reports, key=lambda report: (not report["meant"], report["rank"]))
            return ExitStatus(report["code"], report["sentence"])
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


def _report(code: int, message: str) -> ExitStatus:
    """Print a message that no child process has printed, and return the exit status."""
    print(f"dreambooth: {message}", file=sys.stderr)
    return ExitStatus(code, message)


def _send_signal(pid: int, number: int, launcher: bool) -> None:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        workers = [child.pid for child in psutil.Process(pid).children()] if launcher else []
        for target in workers or [pid]:
            os.kill(target, number)
