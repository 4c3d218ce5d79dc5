"""`python -m tools.torture.no_flock MACHINE ARGUMENTS`: trains on a file system without flock, on a machine of its own.

The product code has no hooks for this: functions are replaced inside the process.
"""

import errno
import fcntl
import os
import sys

from tests.support import faults


def install(machine: str) -> None:
    """Replace flock by an error. Processes with another `machine` do not know each other. Leases are short."""
    from dreambooth.utils import file_lock

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock  # type: ignore[assignment]
    file_lock._machine = lambda: f"machine {machine}"
    file_lock.LEASE, file_lock.HEARTBEAT = 10.0, 1.0


if __name__ == "__main__":
    install(sys.argv[1])
    faults.main("train", "", "0", sys.argv[2])
