"""SIGTERM (spot instances, Kubernetes, SageMaker) and Ctrl-C ask a run to save and stop; a second one does not wait."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dreambooth.errors import Interrupted


def again(resume: str) -> str:
    """What goes on with a run that was saved; `never`, or a path, would begin where it began this time.

    Args:
        resume: checkpoint.resume.
    """
    return "repeat the command" if resume == "auto" else "repeat the command without checkpoint.resume"


class Stop:
    """Set once somebody asked the run to stop."""

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the signal

    def check(self) -> None:
        """Raise Interrupted where there is nothing to save yet."""
        if self.requested:
            raise Interrupted(f"{self.requested}: stopped before the first step; repeat the command to go on")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Catch SIGTERM and SIGINT for a while."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
