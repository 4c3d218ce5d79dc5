"""Stop requests: signals and deadlines that make a run save its state and stop.

The first SIGTERM (from spot instances, Kubernetes, SageMaker) or Ctrl-C is a stop request. A second signal interrupts
the run at once, except for a second SIGTERM under Slurm.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

from dreambooth.errors import Interrupted

BEFORE_FIRST_STEP = "stopped before the first step; repeat the command to continue"


class _Abandoned(KeyboardInterrupt):
    """Ends the block of `StopRequest.at_once`. Not a subclass of Exception, so that libraries do not catch it."""


class StopRequest:
    """Records whether a signal or a deadline requested that the run stops.

    Attributes:
        signal_name: name of the signal that was received, such as SIGTERM, or the reason of a `deadline` that has
            passed; None before.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._at_once = False  # whether a block of `at_once` is running
        self._by_deadline = False  # whether the stop was requested by a deadline, and no signal has been received

    def receive(self, number: int) -> None:
        """Record a signal. Inside a block of `at_once`, also end the block.

        Under Slurm, a second SIGTERM is ignored: Slurm sends two of them at once to a job that it preempts, and SIGKILL
        when the time is over (https://slurm.schedmd.com/preempt.html).

        Raises:
            KeyboardInterrupt: a block of `at_once` is running and is ended, or a signal was received before this one.
        """
        if self.signal_name and not self._by_deadline:
            if _is_repeated(number):
                return
            raise KeyboardInterrupt
        self._by_deadline = False
        self._request(self.signal_name or signal.Signals(number).name)

    def _request(self, reason: str) -> None:
        self.signal_name = reason
        if self._at_once:
            raise _Abandoned

    @contextmanager
    def deadline(self, seconds: float, reason: str) -> Iterator[None]:
        """Context manager that requests a stop after `seconds`, as a first signal does. It uses SIGALRM.

        Args:
            reason: what the user is told in place of the name of a signal.
        """
        def handle(number: int, frame: FrameType | None) -> None:
            if not self.signal_name:
                self._by_deadline = True
                self._request(reason)

        previous = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), 1e8))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def check(self) -> None:
        """Raise Interrupted if a stop was requested. Called before the first step, when there is nothing to save."""
        if self.signal_name:
            raise Interrupted(f"{self.signal_name}: {BEFORE_FIRST_STEP}")

    @contextmanager
    def at_once(self, message: str = BEFORE_FIRST_STEP) -> Iterator[None]:
        """Context manager of work that may be abandoned at any moment: it is repeated later, and nothing is lost.

        A stop request ends the block at once, wherever the main thread is: in a download, while a photo is decoded, or
        in the middle of a picture. Work whose state has to be saved must not be inside the block.

        Args:
            message: what the user is told after the name of the signal.

        Raises:
            Interrupted: a stop was requested before the block or inside it.
        """
        outer = self._at_once
        try:
            self._at_once = True
            try:
                if self.signal_name:  # it came before
                    raise _Abandoned
                yield
            finally:
                self._at_once = outer
        except _Abandoned:
            pass
        except Exception:  # a library may turn the end of its work into an error of its own
            if not self.signal_name:
                raise
        if self.signal_name:
            raise Interrupted(f"{self.signal_name}: {message}") from None


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGINT in the yielded StopRequest while the block runs.

    Raises:
        KeyboardInterrupt: inside the block, at the second signal.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.receive(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            if not (stop.signal_name and _is_repeated(number)):  # the process still has to report and to end
                signal.signal(number, handler)


def _is_repeated(number: int) -> bool:
    """Return whether a second signal of this number is a repetition that means nothing new: SIGTERM under Slurm."""
    return number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ


def report_early_interrupts() -> None:
    """Make Ctrl-C end a command with one sentence and exit code 5 while the command still imports its libraries.

    The imports take about one second. The package calls this function when it is imported. After the imports,
    `cli.run_job` and `catch_stop_signals` handle Ctrl-C. In a process that is not a command of this package, such as a
    notebook, this function does nothing.
    """
    words = sys.orig_argv[1:4]  # -m dreambooth.train, or the path of the script dreambooth-train
    if not any(Path(word).name.startswith("dreambooth") for word in words):
        return
    previous = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            previous(kind, error, trace)
            return
        with suppress(OSError):
            sys.stdout.flush()
            print("dreambooth: interrupted; repeat the command", file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_code)

    sys.excepthook = report


def how_to_resume(resume: str) -> str:
    """Return how the user can resume a saved run, as the start of a sentence.

    If checkpoint.resume is auto, the user repeats the command. If it is never or a path, the same command would not
    continue from the last checkpoint, so the user must repeat the command without this setting.

    Args:
        resume: the run's checkpoint.resume: auto, never, or the path of a checkpoint.
    """
    return "repeat the command" if resume == "auto" else "repeat the command without checkpoint.resume"
