"""Stop requests: the first SIGTERM (spot instances, Kubernetes, SageMaker) or Ctrl-C asks a run to save its state and
stop; the second one interrupts it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dreambooth.errors import Interrupted


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
        signal_name: name of the signal that was received, such as SIGTERM; None so far.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def check(self) -> None:
        """Raise Interrupted if a stop was requested. For the time before the first step, when nothing can be saved."""
        if self.signal_name:
            raise Interrupted(f"{self.signal_name}: stopped before the first step; repeat the command to go on")


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGINT in the yielded StopRequest while the block runs.

    Raises:
        KeyboardInterrupt: inside the block, at the second signal.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal_name:
            raise KeyboardInterrupt
        stop.signal_name = signal.Signals(number).name

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def how_to_resume(resume: str) -> str:
    """What to do to continue a run that was saved, as the start of a sentence.

    With checkpoint.resume=never, or a path, the same command would start from the same point again.

    Args:
        resume: the run's checkpoint.resume.
    """
    return "repeat the command" if resume == "auto" else "repeat the command without checkpoint.resume"
