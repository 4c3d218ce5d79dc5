"""Process settings that make a run on a CPU faster: how OpenMP threads wait, and whether malloc keeps freed memory.

OpenMP: an idle thread spins for a while before it sleeps. Environment variables set how long; libgomp reads them when
torch is imported. A spinning thread resumes at once but occupies its core: beside another busy process, libgomp's
default makes training steps 32 times as long as without spinning (docs/performance.md). If other processes are idle
when a command starts, threads spin for LONG_SPIN, which is about as fast as the default there, and costs far less if
another process starts later.

malloc: glibc maps new pages for each tensor of more than 32 MiB, and returns them to the kernel when the tensor is
freed. The kernel clears every new page. A step of Stable Diffusion 1.5 allocates and frees gigabytes of gradients and
activations: clearing took 3.5 s of the 19 s of CPU time of a step, and 0.1 s with `keep_freed_memory`
(docs/performance.md). `keep_freed_memory` does not change the results of a run. After its call, freed memory stays in
the process until `release_freed_memory`, which a run calls before its export.
"""

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

PROC_STAT = Path("/proc/stat")  # covers the whole machine, also inside a container
BUSY_CORES = 0.2  # number of cores; if other processes use more, the machine counts as shared
MIN_WATCH_SECONDS = 0.2  # the kernel's clock, with ticks of 10 ms, is too coarse for less
LONG_SPIN, SHORT_SPIN = "10000", "1000"  # iterations of libgomp's spin loop; its own default is 300000
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from <malloc.h>
MALLOC_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@dataclass(frozen=True)
class CpuTimes:
    """The time and the CPU times of the machine and of this process, read at one moment, in seconds.

    Attributes:
        clock: the time, from the monotonic clock.
        busy: time for which the cores were not idle, summed over cores; None if the system does not report it.
        own: CPU time of this process.
    """

    clock: float
    busy: float | None
    own: float


def read_cpu_times() -> CpuTimes:
    """Return the monotonic clock, the busy time of all cores and the CPU time of this process, as they are now."""
    return CpuTimes(time.monotonic(), _busy_seconds(), time.process_time())


def openmp_environment(since: CpuTimes | None = None, until: CpuTimes | None = None) -> dict[str, str]:
    """Return the environment variables that set how long OpenMP threads spin. Set them before torch is imported.

    Args:
        since: start of the interval in which the load by other processes is measured; None: the import of this module.
        until: end of this interval; None: the time of the call.
    """
    cores_idle = _cores_idle(since or PROCESS_START, until or read_cpu_times())
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": LONG_SPIN if cores_idle else SHORT_SPIN}


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later tensors, and return whether glibc does so.

    Change nothing and return False if the system has no glibc, or if one of the environment variables MALLOC_SETTINGS
    is set, because the user's own settings take precedence.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or os.environ.keys() & set(MALLOC_SETTINGS):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Make glibc return the freed memory that it keeps. Without glibc, do nothing."""
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


def _cores_idle(since: CpuTimes, until: CpuTimes) -> bool:
    """Return whether other processes used fewer than BUSY_CORES cores on average; False if their load is unknown."""
    seconds = until.clock - since.clock
    if since.busy is None or until.busy is None or seconds < MIN_WATCH_SECONDS:
        return False
    return until.busy - since.busy - (until.own - since.own) < BUSY_CORES * seconds


def _busy_seconds() -> float | None:
    try:
        name, *ticks = PROC_STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, interrupts, soft, stolen = map(int, ticks[:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK") if name == "cpu" else None


PROCESS_START = read_cpu_times()  # when the command starts; Hydra then composes the run until the second reading
