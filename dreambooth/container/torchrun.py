"""Runs PyTorch's launcher with reliable restarts, and without a traceback, which a failed process has already printed.

The launcher exits with the exit code of the training process that failed first. If a signal killed that training
process, the launcher exits with 128 plus the signal's number, as in a shell.
"""

import os
import signal
import sys
from collections.abc import Collection

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main


def root_exit_code(failures: Collection[ProcessFailure]) -> int:
    """Return the exit code of the process that caused the other failures; -N if signal N ended it.

    Failures more than one second after the first failure are ignored. Among the rest, the first of these is the cause:

    1. A process killed by SIGKILL. It prints nothing, and processes that wait for it fail immediately. The launcher
       itself sends SIGKILL, too, but more than one second after the first failure.
    2. A process that ended for another reason.
    3. A process ended by SIGTERM, because the launcher itself sends SIGTERM to the remaining processes.
    """
    first_failure = min(failure.timestamp for failure in failures)
    # Timestamps are whole seconds: failures within one second may have happened in any order.
    codes = [failure.exitcode for failure in failures if failure.timestamp <= first_failure + 1]
    return min(codes, key=lambda code: (code != -signal.SIGKILL, code == -signal.SIGTERM, code > 0))


def use_new_stores() -> None:
    """Make the launcher open a new store of addresses for each start of the processes, unless the user has chosen.

    By default the launcher keeps one store for all starts. After a restart, a process may then find the address of a
    process that has ended, and cannot connect (pytorch/pytorch#135712; seen with PyTorch 2.13 and gloo).
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


if __name__ == "__main__":
    use_new_stores()
    try:
        main()
    except ChildFailedError as error:
        exit_code = root_exit_code(error.failures.values())
        sys.exit(exit_code if exit_code > 0 else 128 - exit_code)
