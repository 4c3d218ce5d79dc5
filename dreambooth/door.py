"""What every door does with how a run ends: one sentence on stderr, the exit code, never a lost traceback."""

import atexit
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from dreambooth.errors import DreamBoothError, Interrupted
from dreambooth.schema import Memory

ENVIRONMENT = {  # for libraries that look before we can tell them; what the user has set wins
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are several times slower when anything else wants a core
}
_codes: list[int] = []  # of the jobs in this process; a sweep has several


def attempt(job: Callable[[], float | None], sweep: bool) -> float | None:
    """Run a job. A failed one gives NaN, its exit code is kept for `leave`, and a sweep goes on with the next;
    an interrupted one ends the sweep too."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning):  # what libraries tell each other
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
    try:
        return job()
    except DreamBoothError as error:
        print(f"dreambooth: {error}", file=sys.stderr)
        _codes.append(error.exit_code)
    except KeyboardInterrupt:
        print("dreambooth: interrupted; repeat the command to go on from the last checkpoint", file=sys.stderr)
        _codes.append(Interrupted.exit_code)
    except Exception:
        traceback.print_exc()
        _codes.append(1)
    if sweep and _codes[-1] == Interrupted.exit_code:
        sys.exit(Interrupted.exit_code)
    return math.nan


def allocator(memory: Memory) -> None:
    """Settings of PyTorch's CUDA allocator, which it reads when torch is imported; what the user has set wins."""
    chosen = {"expandable_segments": "True" if memory.expandable_segments else None,
              "max_split_size_mb": memory.max_split_size_mb}
    text = ",".join(f"{key}:{value}" for key, value in chosen.items() if value is not None)
    if text and not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = text


def leave() -> None:
    """End the process with the code of the first job that failed, or 0.

    Under torchrun the interpreter is not taken down piece by piece: torch's threads of communication then ask for its
    lock, and about one finished run in ten ended in SIGABRT or SIGSEGV (gloo, torch 2.13).
    """
    code = _codes[0] if _codes else 0
    if "TORCHELASTIC_RUN_ID" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.stdout.flush()
    sys.exit(code)
