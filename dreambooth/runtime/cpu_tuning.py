"""How OpenMP's threads wait on a CPU: libgomp reads it from the environment when torch is imported.

A thread that spins is at work at once, and takes its core from whoever else wants it: beside a busy neighbour, threads
that spin long train at a quarter of their speed (docs/benchmarks.md). So they spin long only where nobody else is.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")  # of the machine, also in a container
BUSY = 0.2  # cores: more than this share of them, used by others, is a neighbour
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
