"""The ends of a run that a user can act on, and the exit code of each.

| code | meaning |
|---|---|
| 0 | done |
| 1 | user error: one sentence says what to type |
| 3 | does not fit (VRAM, host memory, disk) |
| 4 | out of memory while running |
| 5 | interrupted, state saved |
| 6 | diverged: non-finite loss, or too many skipped fp16 steps |

Anything else that escapes is an internal fault: it keeps its traceback and also ends with 1.
"""

ENDS = "DREAMBOOTH_ENDS"  # a folder in which every failed process leaves RANK.json, for who started them


class DreamBoothError(Exception):
    """Base of every error whose message is meant for the user. The text is one clear sentence."""

    exit_code = 1


class UserError(DreamBoothError):
    """The input is wrong; the message says what to type instead."""


class ConfigError(UserError):
    """One or more configuration rules are broken; one sentence a line, all of them together."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DoesNotFit(DreamBoothError):
    """The run needs more of something (disk, VRAM) than this machine has."""

    exit_code = 3


class OutOfMemory(DreamBoothError):
    """Memory ran out during a phase of the run."""

    exit_code = 4


class Interrupted(DreamBoothError):
    """SIGTERM or Ctrl-C; what can be saved has been saved."""

    exit_code = 5


class Diverged(DreamBoothError):
    """The loss is no longer a number, or fp16 gradients overflow step after step."""

    exit_code = 6
