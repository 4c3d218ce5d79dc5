"""Jobs from the first submission to the last end: at most so many at a time, one live table, nothing lost on Ctrl-C."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console as Rich
from rich.live import Live
from rich.table import Table

from dreambooth.cloud.job import COMPLETED, FAILED, UNKNOWN, WAITING, Backend, Busy, Job, Seen, Unreachable
from dreambooth.console import Console
from dreambooth.errors import DreamBoothError, Interrupted, UserError

SLOWEST = 120.0  # seconds between two looks while AWS is busy
PATIENCE = 3600.0  # seconds without any answer, after which the jobs are left to run on
HEAD = ("job", "status", "step", "loss", "cost", "overrides")


class Follower:
    """Submits and watches the jobs of a sweep."""

    def __init__(self, backend: Backend, jobs: Sequence[Job], *, max_parallel: int, poll_seconds: float,
                 stop_on_interrupt: bool, again: str, sleep: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.jobs, self.seen = list(jobs), [Seen() for _ in jobs]
        self._backend, self._max, self._poll = backend, max_parallel, poll_seconds
        self._stop, self._again, self._sleep, self._clock = stop_on_interrupt, again, sleep, clock
        self._rich, self._console, self._told = Rich(soft_wrap=True), Console(), [""] * len(self.jobs)
        self._answered = clock()
        self._warned = False

    def run(self) -> list[Seen]:
        """How each job ended, in order.

        Raises:
            Interrupted: Ctrl-C; the jobs were stopped or run on, as told.
            UserError: AWS has not answered for an hour; the jobs run on.
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
            raise Interrupted(self._interrupted()) from None

    def _turn(self) -> bool:
        """Look at every running job and begin what may begin; False: somebody was too busy to answer."""
        answered = True
        for number, job in enumerate(self.jobs):
            before = self.seen[number]
            if before.ended or before.status == WAITING:
                continue
            try:
                self._saw(number, self._backend.look(job))
            except Unreachable as error:
                answered = self._lost(error)
        for number, job in enumerate(self.jobs):
            running = sum(not seen.ended and seen.status != WAITING for seen in self.seen)
            if self.seen[number].status != WAITING:
                continue
            if running >= self._max or not answered:
                break
            try:
                self._saw(number, self._backend.submit(job))
            except Busy as error:
                if not running:  # nothing of ours would make room
                    self._saw(number, Seen(FAILED, reason=str(error)))
                    continue
                break
            except Unreachable as error:
                answered = self._lost(error)
            except DreamBoothError as error:
                self._saw(number, Seen(FAILED, reason=str(error)))
        return answered

    def _saw(self, number: int, seen: Seen) -> None:
        self._answered, self._warned = self._clock(), False
        old = self.seen[number]
        self.seen[number] = seen = replace(seen, step=seen.step if seen.step is not None else old.step,
                                           loss=seen.loss if seen.loss is not None else old.loss)
        said = f"{self.jobs[number].name}  {seen.status}  {seen.detail}"
        if said != self._told[number] and not self._rich.is_terminal:
            self._console.say(said + (f"  {seen.reason}" if seen.reason else ""))
        self._told[number] = said

    def _lost(self, error: Unreachable) -> bool:
        silent = self._clock() - self._answered
        if silent > PATIENCE:
            raise UserError(f"AWS has not answered for {silent / 60:.0f} minutes ({error}); the jobs run on: "
                            f"{self._again} follows them again")
        if not self._warned:
            self._console.say(f"AWS does not answer ({error}): the jobs run on, asking again")
            self._warned = True
        return False

    def _interrupted(self) -> str:
        begun = [job for job, seen in zip(self.jobs, self.seen, strict=True)
                 if not seen.ended and seen.status != WAITING]
        if self._stop:
            left = []
            for job in begun:
                try:
                    self._backend.stop(job)
                except (Unreachable, DreamBoothError):
                    left.append(self._backend.stop_hint(job))
            words = f"{len(begun) - len(left)} jobs were told to save and stop"
            return "\n  ".join([words + (", these could not be:" if left else ""), *left])
        hints = [self._backend.stop_hint(job) for job in begun]
        return "\n  ".join([f"{len(begun)} jobs run on: {self._again} follows them again; to stop them type", *hints])

    def _table(self) -> Table:
        table = Table(*HEAD, box=None, pad_edge=False)
        for job, seen in zip(self.jobs, self.seen, strict=True):
            table.add_row(*row(job, seen))
        return table


def row(job: Job, seen: Seen) -> tuple[str, ...]:
    """A line of the table."""
    cost = seen.usd(job)
    note = "" if cost is None else f"${cost:.2f}" + ("" if seen.billed is not None else " so far")
    return (job.name, seen.detail if seen.status not in (COMPLETED, FAILED, UNKNOWN) and seen.detail else seen.status,
            "" if seen.step is None else f"{seen.step}/{job.steps}", "" if seen.loss is None else f"{seen.loss:.4f}",
            note, " ".join(job.overrides))
