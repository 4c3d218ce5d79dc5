"""What every door does with how a run ends: one sentence on stderr, the exit code, never a lost traceback."""

import argparse
import atexit
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from dreambooth.config.schema import Memory
from dreambooth.errors import ENDS, DreamBoothError, Interrupted
from dreambooth.runtime import cpu_tuning

_taken: dict[str, str] = {}  # key -> value of words that Hydra does not get to see
_codes: list[int] = []  # of the jobs in this process; a sweep has several


def attempt(job: Callable[[], float | None], sweep: bool, again: str = "repeat the command") -> float | None:
    """Run a job. A failed one gives NaN, its exit code is kept for `leave`, and a sweep goes on with the next;
    an interrupted one ends the sweep too.

    Args:
        again: what to do after Ctrl-C that nobody waited for.
    """
    for name, value in cpu_tuning.waiting().items():
        os.environ.setdefault(name, value)  # what the user has set wins
    for category in (FutureWarning, DeprecationWarning):  # what libraries tell each other
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
    try:
        return job()
    except DreamBoothError as error:
        print(f"dreambooth: {error}", file=sys.stderr)
        _ended(error.exit_code, str(error))
    except KeyboardInterrupt:
        sentence = f"interrupted; {again}"
        print(f"dreambooth: {sentence}", file=sys.stderr)
        _ended(Interrupted.exit_code, sentence)
    except Exception as error:
        traceback.print_exc()
        _ended(1, fault(error), meant=False)
    if sweep and _codes[-1] == Interrupted.exit_code:
        sys.exit(Interrupted.exit_code)
    return math.nan


def fault(error: Exception) -> str:
    """An internal fault in a sentence, for whoever does not see its traceback."""
    return f"a fault of dreambooth, the log has its traceback: {type(error).__name__}: {error}"


def with_overrides(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Options, and as `overrides` the words key=value among them, wherever they stand."""
    options, words = parser.parse_known_args()
    if wrong := [word for word in words if "=" not in word or word.startswith("-")]:
        parser.error(f"{wrong[0]} is neither an option nor KEY=VALUE")
    options.overrides = words
    return options


def take(key: str) -> None:
    """Keep the words `key=value` from Hydra, which would look for an option of the group of that name in conf/."""
    words = [word for word in sys.argv[1:] if word.startswith(f"{key}=")]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in words]
    _taken[key] = words[-1].partition("=")[2].strip("'\"") if words else ""


def given(key: str) -> str | None:
    """The value of the last word that `take` took; None: there was none."""
    return _taken.get(key) or None


def _ended(code: int, sentence: str, meant: bool = True) -> None:
    _codes.append(code)
    if folder := os.environ.get(ENDS):
        rank = int(os.environ.get("RANK", "0"))  # as PyTorch's launcher sets it
        end = {"rank": rank, "code": code, "sentence": sentence, "meant": meant}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(end), encoding="utf-8")


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
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.stdout.flush()
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
