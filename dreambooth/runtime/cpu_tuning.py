"""Settings of the process that make a run on a CPU faster: how OpenMP threads wait, and what malloc keeps.

OpenMP: libgomp reads from the environment, when torch is imported, how long an idle thread spins before it sleeps. A
spinning thread resumes at once but occupies its core: beside another busy process, long spinning reduces training to a
quarter of its speed (docs/benchmarks.md). Threads therefore spin long only if the other cores are idle.

malloc: glibc maps a tensor of more than 32 MiB anew and returns it to the kernel when it is freed; the kernel then
clears each page again. A step of Stable Diffusion 1.5 allocates and frees gigabytes of gradients and activations: this
took 3.5 of its 19 CPU seconds, and 0.1 with `keep_freed_memory` (docs/benchmarks.md). The results of a run do not
change; its resident memory does not shrink between phases.
"""

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")  # of the machine, also in a container
BUSY = 0.2  # cores: more than this share of them, used by others, is a neighbour
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
MALLOC_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
SHORTEST = 0.2  # seconds of watching; in less the kernel's clock of 10 ms says nothing
LONG, SHORT = "300000", "1000"  # turns of libgomp's loop; the long one is its own default


@dataclass(frozen=True)
class Moment:
    """Seconds at a moment: of the clock, of all cores together that were not idle, of this process."""

    clock: float
    busy: float | None  # None: the system does not tell
    own: float


def now() -> Moment:
    return Moment(time.monotonic(), _busy(), time.process_time())


def waiting(since: Moment | None = None, until: Moment | None = None) -> dict[str, str]:
    """Environment variables, for libraries that look before we can tell them."""
    alone = _alone(since or BEGAN, until or now())
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": LONG if alone else SHORT}


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensor; False if there is no glibc, or the user has configured it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or os.environ.keys() & set(MALLOC_SETTINGS):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def _alone(since: Moment, until: Moment) -> bool:
    watched = until.clock - since.clock
    if since.busy is None or until.busy is None or watched < SHORTEST:
        return False
    return until.busy - since.busy - (until.own - since.own) < BUSY * watched


def _busy() -> float | None:
    try:
        name, *ticks = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, interrupts, soft, stolen = map(int, ticks[:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK") if name == "cpu" else None


BEGAN = now()  # as the door is opened; Hydra composes meanwhile
