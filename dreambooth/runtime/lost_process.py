"""Reports the loss of another process of a run in one sentence. PyTorch's errors about it look like internal faults."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from dreambooth.errors import LostProcess
from dreambooth.utils.signals import how_to_resume

_GLOO = re.compile(r"gloo/transport/|Gloo connectFullMesh")  # Gloo has no error class of its own


@contextmanager
def reporting_lost_process(resume: str) -> Iterator[None]:
    """Context manager that raises LostProcess if a collective operation fails because another process is gone.

    NCCL and the store of the processes raise DistError. Gloo raises RuntimeError.

    Args:
        resume: the run's checkpoint.resume.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistError) or _GLOO.search(str(error))):
            raise
        reason = str(error).split("\n")[0].split("] ", 1)[-1].split(". This is")[0]  # without PyTorch's file and advice
        raise LostProcess(f"another process of this run has ended or cannot be reached ({reason}): see its log, then "
                          f"{how_to_resume(resume)} to continue from the last checkpoint") from error
