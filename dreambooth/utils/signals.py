"""Stop requests: signals that make a run save its state and stop.

The first SIGTERM (from spot instances, Kubernetes, SageMaker) or Ctrl-C is a stop request. A second signal interrupts
the run at once.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dreambooth.errors import Interrupted


class StopRequest:
    """Records whether a signal requested that the run stops.

    Attributes:
        signal_name: name of the signal that was received, such as SIGTERM; None before the first signal.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def check(self) -> None:
        """Raise Interrupted if a stop was requested. Called before the first step, when there is nothing to save."""
        if self.signal_name:
            raise Interrupted(f"{self.signal_name}: stopped before the first step; repeat the command to continue")


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
    """Return how the user can resume a saved run, as the start of a sentence.

    With checkpoint.resume=never, or a path, the same command would start from the same point again. The user must then
    leave this override out.

    Args:
        resume: the run's checkpoint.resume.
    """
    return "repeat the command" if resume == "auto" else "repeat the command without checkpoint.resume"
