"""PyTorch's launcher as it is, without its traceback: the process that failed has said why in one sentence.

It ends as that process did: with its code, or 128 and the signal that killed it, as a shell has it.
"""

import signal
import sys
from collections.abc import Collection

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main


def first(failures: Collection[ProcessFailure]) -> int:
    """How the process ended that took the others along.

    A killed one says nothing, and the others fail with it at once for want of it: it counts before them. The launcher
    itself ends who is left by SIGTERM, and much later by SIGKILL.
    """
    began = min(failure.timestamp for failure in failures)
    codes = [failure.exitcode for failure in failures if failure.timestamp <= began + 1]  # whole seconds
    return min(codes, key=lambda code: (code != -signal.SIGKILL, code == -signal.SIGTERM, code > 0))


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        ended = first(error.failures.values())
        sys.exit(ended if ended > 0 else 128 - ended)
