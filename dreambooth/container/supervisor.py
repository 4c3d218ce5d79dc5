"""Runs a command as a child: passes signals on once each, and learns how it ended, also when it was killed."""

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

from dreambooth.errors import ENDS, Interrupted

PASSED_ON = (signal.SIGTERM, signal.SIGINT)
POLL = 0.2  # seconds
EARLY = "stopped before the first step; start it again to go on"


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int = 0
    sentence: str = ""  # why, if not with 0


class Supervisor:
    """Stands between the container's signals and the processes that train.

    It stays when a child is killed for want of memory, and can tell. A child has a session of its own, so that a
    terminal's Ctrl-C comes through here and not twice.
    """

    def __init__(self) -> None:
        self._asked: list[int] = []
        for number in PASSED_ON:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)

    def run(self, command: Sequence[str], environment: Mapping[str, str], launcher: bool = False,
            stopped: str = EARLY) -> End:
        """Run the command to its end.

        Args:
            launcher: the command is container.launch, and starts processes that are to get the signals in its place.
                PyTorch's launcher would end its processes one after the other.
            stopped: what to say if a signal comes before the command, or ends it before it can say so itself.
        """
        if self._asked:
            return self._stopped(stopped)
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.Popen(command, env={**os.environ, **environment, ENDS: folder}, start_new_session=True)
            delivered = 0
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = child.wait(POLL)
                    return self._end(128 - code if launcher and code > 128 else code, Path(folder), stopped)
                if delivered < len(self._asked):
                    _deliver(child.pid, self._asked[delivered], launcher)
                    delivered += 1

    def _end(self, code: int, folder: Path, stopped: str = EARLY) -> End:
        told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        if code and told and code != -signal.SIGKILL:  # whoever is killed tells nothing, and others of its absence
            # What fails one process looks like a fault to the others, who wait for it.
            said = min(told, key=lambda end: (not end["meant"], end["rank"]))
            return End(said["code"], said["sentence"])
        if code < 0 and -code in self._asked:
            return self._stopped(stopped)
        if code < 0:
            name = signal.Signals(-code).name
            why = ": most likely host memory ran out; take a larger instance" if -code == signal.SIGKILL else ""
            return _said(128 - code, f"a process of the job was killed by {name}{why}")
        return _said(code, f"the job ended with {code}: the log says why") if code else End()

    def _stopped(self, sentence: str) -> End:
        return _said(Interrupted.exit_code, f"{signal.Signals(self._asked[0]).name}: {sentence}")


def _said(code: int, sentence: str) -> End:
    """An end that nobody else has told of."""
    print(f"dreambooth: {sentence}", file=sys.stderr)
    return End(code, sentence)


def _deliver(pid: int, number: int, launcher: bool) -> None:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        workers = [child.pid for child in psutil.Process(pid).children()] if launcher else []
        for target in workers or [pid]:
            os.kill(target, number)
