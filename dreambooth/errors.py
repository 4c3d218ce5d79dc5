"""Errors that a user can act on, and the exit code of each.

| code | meaning |
|---|---|
| 0 | done |
| 1 | user error; the message is one sentence that says what to type |
| 3 | the run does not fit (VRAM, host memory, disk, budget) |
| 4 | out of memory while running |
| 5 | interrupted, state saved |
| 6 | diverged: non-finite loss, or too many skipped fp16 steps |

Every other exception is an internal fault: the traceback is printed, and the exit code is 1.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# Name of the environment variable with the path of a folder. Every failed process writes a report for its parent
# process to RANK.json in this folder.
EXIT_REPORT_DIR = "DREAMBOOTH_ENDS"


class DreamBoothError(Exception):
    """Base class of every error whose message is meant for the user. The message is one clear sentence."""

    exit_code = 1


class UserError(DreamBoothError):
    """The input is wrong; the message says what to type instead."""


class ConfigError(UserError):
    """One or more configuration rules are broken; the message has one line per broken rule."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DoesNotFit(DreamBoothError):
    """The run needs more disk, host memory or VRAM than this machine has, or more time or money than its budget."""

    exit_code = 3


class OverBudget(DoesNotFit):
    """A run that has used a part of its budget needs more than what is left."""


class OutOfMemory(DreamBoothError):
    """Memory ran out during a phase of the run, such as sampling."""

    exit_code = 4


class LostProcess(DreamBoothError):
    """Another of the processes that train together is gone. Its own log says why."""


class Interrupted(DreamBoothError):
    """The run received SIGTERM or Ctrl-C, or its budget is used up; everything that can be saved has been saved."""

    exit_code = 5


class Diverged(DreamBoothError):
    """The loss is no longer a finite number, or fp16 gradients overflow step after step."""

    exit_code = 6


def choose_report(reports: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the exit report that says best why a job of several processes has failed.

    Processes that wait for a failed one report its loss or internal errors, which are only consequences. Of the others,
    that of the first process is returned.
    """
    return min(reports, key=lambda report: (report.get("lost", False), not report["meant"], report["rank"]))
