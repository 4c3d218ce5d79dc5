"""Runs a command and records its start, its CPU time at short intervals, and its peak resident memory."""

import math
import os
import signal
import subprocess
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

KIB, GIB = 2**10, 2**30
SAMPLE_INTERVAL = 0.02  # seconds between samples of the CPU time; one takes a few microseconds


@dataclass
class ProcessUsage:
    """Resources that one process used. Times are in seconds since 1970."""

    started: float
    peak_rss_gib: float = 0.0
    cpu_seconds: float = 0.0  # of all its threads and children
    cpu_samples: list[tuple[float, float]] = field(default_factory=list)  # time, CPU seconds of its threads so far

    def cpu_seconds_until(self, moment: float) -> float:
        """Return the CPU seconds from the start until `moment`, interpolated between samples.

        On a shared machine CPU time is the better measure of work: wall time also depends on other processes.
        """
        index = bisect_left(self.cpu_samples, (moment, 0.0))
        if not 0 < index < len(self.cpu_samples):
            return self.cpu_samples[min(index, len(self.cpu_samples) - 1)][1]
        (earlier, used), (later, used_later) = self.cpu_samples[index - 1:index + 1]
        return used + (used_later - used) * (moment - earlier) / (later - earlier)


class CommandFailed(SystemExit):
    """The command ended with another exit code than 0, or took too long; the message ends with its last output.

    Attributes:
        output: all that it wrote; if it wrote nothing, the message.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output or message


def run_monitored(command: list[str], folder: Path, environment: dict[str, str], log: Path,
                  timeout: float = math.inf) -> ProcessUsage:
    """Run `command` in `folder` and write its output to `log`.

    Args:
        timeout: seconds after which the command and its children are killed.

    Raises:
        CommandFailed: the command failed, or did not end in time.
    """
    usage = ProcessUsage(time.time())
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file,
                                   start_new_session=True)
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                usage.cpu_samples.append((time.time(), _cpu_seconds(process.pid)))
                if time.time() - usage.started > timeout:
                    raise CommandFailed(f"did not end within {timeout / 60:.1f} minutes")
                time.sleep(SAMPLE_INTERVAL)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    _, status, resources = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        output = log.read_text(errors="replace")
        raise CommandFailed(f"{' '.join(command)}\nended with exit code {process.returncode}:\n{output[-3000:]}",
                            output)
    usage.peak_rss_gib, usage.cpu_seconds = resources.ru_maxrss * KIB / GIB, resources.ru_utime + resources.ru_stime
    return usage


def _cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process so far, including ended threads (fields 14 and 15 of /proc/PID/stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
