"""Jobs from the first submission to the last end: at most so many at a time, one live table, nothing lost on Ctrl-C."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from rich.console import Console as Rich
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from dreambooth.cloud.job import (
    COMPLETED,
    FAILED,
    SUBMITTING,
    UNKNOWN,
    WAITING,
    Backend,
    Busy,
    Job,
    LoggedOut,
    Seen,
    Unreachable,
)
from dreambooth.errors import DreamBoothError, Interrupted, UserError
from dreambooth.utils.console import Console

SLOWEST = 120.0  # seconds between two looks while AWS is busy
HEAD = ("job", "status", "step", "loss", "cost", "overrides")


class Follower:
    """Submits and watches the jobs of a sweep.

    Args:
        again: a sentence on how the jobs are followed again.
    """

    def __init__(self, backend: Backend, jobs: Sequence[Job], *, max_parallel: int, poll_seconds: float,
                 stop_on_interrupt: bool, again: str, sleep: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.jobs, self.seen = list(jobs), [Seen() for _ in jobs]
        self._backend, self._max, self._poll = backend, max_parallel, poll_seconds
        self._stop, self._again, self._sleep, self._clock = stop_on_interrupt, again, sleep, clock
        self._rich, self._console, self._told = Rich(soft_wrap=True), Console(), [""] * len(self.jobs)
        self._answered = clock()
        self._warned: set[str] = set()

    def run(self) -> list[Seen]:
        """How each job ended, in order.

        Raises:
            Interrupted: Ctrl-C; the jobs were stopped or run on, as told.
            UserError: AWS has not answered for too long; the jobs run on.
        """
        pause = self._poll
        try:
            with Live(self._table(), console=self._rich, auto_refresh=False) as live:
                while True:
                    pause = self._poll if self._turn() else min(pause * 2, SLOWEST)
                    live.update(self._table(), refresh=self._rich.is_terminal)
                    if all(seen.ended for seen in self.seen):
                        return self.seen
                    self._sleep(pause)
        except KeyboardInterrupt:
            raise Interrupted(self._stopped() if self._stop else self._left()) from None
        except Exception as error:
            if not isinstance(error, DreamBoothError):
                error.add_note(self._left())  # a fault of ours: what is paid for must be known
            raise

    def _turn(self) -> bool:
        """Look at every running job and begin what may begin; False: somebody was too busy to answer."""
        answered = True
        for number, job in enumerate(self.jobs):
            if not self.seen[number].billing or self.seen[number].status == SUBMITTING:
                continue
            try:
                self._saw(number, self._backend.look(job))
            except (Unreachable, DreamBoothError) as error:
                answered = self._lost(error)
        full: set[str] = set()  # types of instances of which there are no more
        for number, job in enumerate(self.jobs):
            if not answered:
                break
            if self.seen[number].status in (WAITING, SUBMITTING) and job.machine not in full:
                answered = self._begun(number, job, full)
        if answered:
            self._warned.clear()
        return answered

    def _begun(self, number: int, job: Job, full: set[str]) -> bool:
        """Submit a job if there is room for it; False: nobody answered."""
        running = sum(seen.billing for other, seen in enumerate(self.seen) if other != number)
        if running >= self._max:
            return True
        self.seen[number] = Seen(SUBMITTING)  # from here on it may be billed, whatever comes between
        try:
            self._saw(number, self._backend.submit(job))
        except Busy as error:
            self.seen[number] = Seen()
            full.add(job.machine)
            if not running:  # nothing of ours would make room
                self._saw(number, Seen(FAILED, reason=str(error)))
        except Unreachable as error:
            if isinstance(error, LoggedOut):
                self.seen[number] = Seen()
            return self._lost(error)
        except DreamBoothError as error:
            self._saw(number, Seen(FAILED, reason=str(error)))
        return True

    def _saw(self, number: int, seen: Seen) -> None:
        self._answered = self._clock()
        old = self.seen[number]
        self.seen[number] = seen = replace(seen, step=seen.step if seen.step is not None else old.step,
                                           loss=seen.loss if seen.loss is not None else old.loss)
        said = f"{self.jobs[number].name}  {seen.status}  {seen.detail}"
        if said != self._told[number] and not self._rich.is_terminal:
            self._console.say(said + (f"  {seen.reason}" if seen.reason else ""))
        self._told[number] = said

    def _lost(self, error: Unreachable | DreamBoothError) -> bool:
        """Of a job nothing can be seen: the others, and a later answer, are not given up for it."""
        silent = self._clock() - self._answered
        if silent >= getattr(error, "patience", Unreachable.patience):
            since = f"; the last answer came {silent / 60:.0f} minutes ago" if silent >= 60 else ""
            raise UserError(f"{error}{since}\n{self._left()}")
        if str(error) not in self._warned:
            self._console.say(f"{error}; the jobs run on, asking again")
            self._warned.add(str(error))
        return False

    # -- what runs on when nobody follows -----------------------------------------------------------------------

    def _billed(self) -> list[int]:
        """The jobs that may cost money; last those of which that is not known."""
        return sorted((number for number, seen in enumerate(self.seen) if seen.billing),
                      key=lambda number: self.seen[number].status == SUBMITTING)

    def _stopped(self) -> str:
        """Tell every job to stop, and say so; a second Ctrl-C waits for none of those that are left."""
        asked = self._billed()
        left = asked[:]
        with suppress(KeyboardInterrupt):
            for number in asked:
                with suppress(Unreachable, DreamBoothError):
                    if self._backend.stop(self.jobs[number]) or self.seen[number].status != SUBMITTING:
                        left.remove(number)
        words = f"{len(asked) - len(left)} jobs were told to save and stop"
        return "\n  ".join([words + (", these may run on; type" if left else ""), *self._hints(left)])

    def _left(self) -> str:
        left = self._billed()
        words = f"{len(left)} jobs run on" if left else "no job runs"
        return "\n  ".join([f"{words}: {self._again}" + ("; to stop them type" if left else ""), *self._hints(left)])

    def _hints(self, numbers: Sequence[int]) -> list[str]:
        return [self._backend.stop_hint(self.jobs[number]) + (
            "  # it may have begun" if self.seen[number].status == SUBMITTING else "") for number in numbers]

    def _table(self) -> Table:
        columns = (Column(name, overflow="fold") for name in HEAD)  # cut off, jobs would look alike
        table = Table(*columns, box=None, pad_edge=False)
        for job, seen in zip(self.jobs, self.seen, strict=True):
            table.add_row(*map(Text, row(job, seen)))  # Text: what a person typed is no markup
        return table


def row(job: Job, seen: Seen) -> tuple[str, ...]:
    """A line of the table."""
    cost = seen.usd(job)
    note = "" if cost is None else f"${cost:.2f}" + ("" if seen.billed is not None else " so far")
    return (job.name, seen.detail if seen.status not in (COMPLETED, FAILED, UNKNOWN) and seen.detail else seen.status,
            "" if seen.step is None else f"{seen.step}/{job.steps}", "" if seen.loss is None else f"{seen.loss:.4f}",
            note, " ".join(job.overrides))
