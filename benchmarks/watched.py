"""Runs a command and watches what it costs: wall time, CPU time as it goes, the peak of its resident memory."""

import os
import subprocess
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

KIB, GIB = 2**10, 2**30
EVERY = 0.02  # seconds between looks; each is a few microseconds


@dataclass
class Watched:
    """One process from its start to its end. Times are in seconds since 1970."""

    began: float
    peak_rss_gib: float = 0.0
    cpu_seconds: float = 0.0  # of all its threads and children
    looks: list[tuple[float, float]] = field(default_factory=list)  # time, CPU seconds of its threads until then

    def cpu(self, moment: float) -> float:
        """CPU seconds until `moment`: on a shared machine they tell what work costs, wall time what others do."""
        at = bisect_left(self.looks, (moment, 0.0))
        if not 0 < at < len(self.looks):
            return self.looks[min(at, len(self.looks) - 1)][1]
        (before, spent), (after, more) = self.looks[at - 1:at + 1]
        return spent + (more - spent) * (moment - before) / (after - before)


def watch(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> Watched:
    """Run `command` in `folder`; if it fails, this program ends and shows what it said."""
    found = Watched(time.time())
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
        while not (done := os.wait4(process.pid, os.WNOHANG))[0]:
            found.looks.append((time.time(), _spent(process.pid)))
            time.sleep(EVERY)
    _, status, usage = done
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    found.peak_rss_gib, found.cpu_seconds = usage.ru_maxrss * KIB / GIB, usage.ru_utime + usage.ru_stime
    return found


def _spent(process: int) -> float:
    """CPU seconds of a process until now, ended threads included: fields 14 and 15 of its stat, in clock ticks."""
    fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
