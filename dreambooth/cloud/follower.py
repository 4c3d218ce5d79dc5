"""Submits the jobs of a sweep, polls them until all have ended, and shows their states in a live table."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from dreambooth.cloud.job import (
    COMPLETED,
    FAILED,
    PRUNED,
    STOP_SECONDS,
    STOPPED,
    SUBMITTING,
    UNKNOWN,
    WAITING,
    Backend,
    Job,
    JobState,
    LoginRequired,
    QuotaExceeded,
    Search,
    Spending,
    Unreachable,
)
from dreambooth.errors import DreamBoothError, Interrupted, UserError
from dreambooth.utils.console import Console
from dreambooth.utils.plurals import counted

MAX_PAUSE = 120.0  # greatest number of seconds between two polls while AWS does not answer
COLUMNS = ("job", "status", "step", "loss", "cost", "overrides")


class Follower:
    """Submits the jobs of a sweep, and polls them until all have ended.

    Args:
        max_parallel: greatest number of jobs that run at the same time.
        poll_seconds: pause between two polls of all running jobs.
        stop_on_interrupt: effect of Ctrl-C on running jobs. True: stop them; False: leave them running.
        follow_hint: a phrase that tells the user how to follow the running jobs again. Messages contain this phrase.
        search: decides from the values that running jobs report which of them are stopped; None: no job is.
        spending: the budget of the sweep. If it is about to be passed, running jobs are stopped; None: no budget.
        sleep: waits for a number of seconds; tests pass a substitute.
        clock: returns the current time in seconds; tests pass a substitute.
    """

    def __init__(self, backend: Backend, jobs: Sequence[Job], *, max_parallel: int, poll_seconds: float,
                 stop_on_interrupt: bool, follow_hint: str, spending: Spending | None = None,
                 search: Search | None = None,
                 sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic) -> None:
        self.jobs, self.states = list(jobs), [JobState() for _ in jobs]
        self._backend, self._max_parallel, self._poll_seconds = backend, max_parallel, poll_seconds
        self._stop_on_interrupt, self._follow_hint, self._sleep, self._clock = (
            stop_on_interrupt, follow_hint, sleep, clock)
        self._rich, self._console = RichConsole(soft_wrap=True), Console()
        self._last_lines = [""] * len(self.jobs)  # for each job, the line that was last printed
        self._last_answer = clock()
        self._printed_errors: set[str] = set()
        self._spending, self._search = spending, search
        self.over_budget = ""  # which limit was reached, once it is
        self._to_stop: set[int] = set()  # jobs that must be asked to stop: the limit was reached, or they are pruned
        self._stop_requested: set[int] = set()  # jobs that were asked to stop

    def run(self) -> list[JobState]:
        """Submit all jobs, poll them until all have ended, and return their final states in the order of `jobs`.

        Raises:
            Interrupted: the user pressed Ctrl-C. Running jobs were stopped or left running, see stop_on_interrupt.
            UserError: the backend has not answered for too long (see `Unreachable.patience`). The jobs continue to run.
        """
        pause = self._poll_seconds
        try:
            # The table of a thousand jobs takes longer than a poll: it is made only where it is shown.
            with Live(get_renderable=self._table, console=self._rich, auto_refresh=False) as live:
                while True:
                    pause = self._poll_seconds if self._update_jobs() else min(pause * 2, MAX_PAUSE)
                    if self._rich.is_terminal:
                        live.refresh()
                    if all(state.ended for state in self.states):
                        return self.states
                    self._sleep(pause)
        except KeyboardInterrupt:
            message = self._stop_jobs() if self._stop_on_interrupt else self._describe_running_jobs()
            raise Interrupted(message) from None
        except Exception as error:
            if not isinstance(error, DreamBoothError):  # a bug: the user must still learn which jobs cost money
                error.add_note(self._describe_running_jobs())
            raise

    def _update_jobs(self) -> bool:
        """Poll every running job, then submit waiting jobs. Return False if the backend did not answer."""
        answered = True
        for number, job in enumerate(self.jobs):
            if not self.states[number].may_be_billed or self.states[number].status == SUBMITTING:
                continue
            try:
                self._set_state(number, self._backend.poll(job))
                self._prune_job(number)
            except (Unreachable, DreamBoothError) as error:
                answered = self._handle_no_answer(error)
        if self._spending:
            self._keep_budget(self._spending)
        answered &= self._send_stop_requests()
        exhausted: set[str] = set()  # instance types whose quota is used up
        running = len(self._running())
        for number, job in enumerate(self.jobs):
            if not answered:
                break
            if self.states[number].status in (WAITING, SUBMITTING) and job.instance_type not in exhausted:
                others = running - self.states[number].may_be_billed
                answered = self._submit(number, job, exhausted, others)
                running = others + self.states[number].may_be_billed
        if answered:
            self._printed_errors.clear()
        return answered

    def _prune_job(self, number: int) -> None:
        """Let the search decide whether a running job is stopped, from the value that it has reported last."""
        job, state = self.jobs[number], self.states[number]
        if self._search is None or state.ended or number in self._stop_requested:
            return
        if not self._search.is_pruned(job.number):
            if not state.reported or not self._search.prune(job.number, *state.reported):
                return
            self._console.say(f"{job.name} is stopped after step {state.reported[0]}: other trials were better")
        self._to_stop.add(number)

    def _send_stop_requests(self) -> bool:
        """Stop the jobs that must be asked to. Return False if the backend did not answer."""
        answered = True
        for number in tuple(self._to_stop):
            if self.states[number].ended:
                self._to_stop.remove(number)
                continue
            try:
                running = self._backend.stop(self.jobs[number])
            except Unreachable as error:
                return self._handle_no_answer(error)
            except DreamBoothError as error:  # of this job alone
                answered = self._handle_no_answer(error)
                continue
            self._to_stop.remove(number)
            self._stop_requested.add(number)
            if not running and self.states[number].status == SUBMITTING:
                self._set_state(number, self._not_started())
        return answered

    def _not_started(self) -> JobState:
        return JobState(STOPPED, billed_seconds=0.0, reason=f"it was not started: {self.over_budget}")

    def _keep_budget(self, spending: Spending) -> None:
        """Choose all running jobs to be stopped if the budget is about to be passed.

        Jobs that wait are not started any more. A job that is asked to stop saves, and ends after some polls.
        """
        margin = self._poll_seconds + STOP_SECONDS
        if not self.over_budget and (limit := spending.passed(self.jobs, self.states, margin)):
            self.over_budget = limit
            self._console.say(f"{limit}: the running jobs are stopped, and no other job is started")
            self._to_stop = set(self._running())
        waiting = [number for number, state in enumerate(self.states) if state.status == WAITING]
        if not self.over_budget and waiting and not self._running() and not spending.holds(
                self.jobs[waiting[0]], self.jobs, self.states):
            self.over_budget = "the rest of the budget does not hold another job"
        if self.over_budget:
            for number in waiting:
                self._set_state(number, self._not_started())

    def _submit(self, number: int, job: Job, exhausted: set[str], running: int) -> bool:
        """Submit a job if fewer than max_parallel jobs are running. Return False if the backend did not answer.

        If the quota of the job's instance type is used up, add the type to `exhausted`.

        Args:
            running: number of other jobs that may be running.
        """
        if running >= self._max_parallel or (
                self._spending and running and not self._spending.holds(job, self.jobs, self.states)):
            return True
        self.states[number] = JobState(SUBMITTING)  # set first: from here on the job may be billed, whatever happens
        try:
            self._set_state(number, self._backend.submit(job))
        except QuotaExceeded as error:
            self.states[number] = JobState()
            exhausted.add(job.instance_type)
            if not running:  # no job of this sweep can free the quota when it ends
                self._set_state(number, JobState(FAILED, reason=str(error)))
        except Unreachable as error:
            if isinstance(error, LoginRequired):
                self.states[number] = JobState()
            return self._handle_no_answer(error)
        except DreamBoothError as error:
            self._set_state(number, JobState(FAILED, reason=str(error)))
        return True

    def _set_state(self, number: int, state: JobState) -> None:
        """Record the new state of a job. Print the new state if it differs from the old state.

        If the new state has no step or loss, it gets the step or loss of the old state.
        """
        self._last_answer = self._clock()
        if state.status == STOPPED and self._search and self._search.is_pruned(self.jobs[number].number):
            state = replace(state, status=PRUNED, reason="pruned: other trials were better")
        old = self.states[number]
        self.states[number] = state = replace(state, step=state.step if state.step is not None else old.step,
                                              loss=state.loss if state.loss is not None else old.loss)
        line = f"{self.jobs[number].name}  {state.status}  {state.detail}"
        if line != self._last_lines[number] and not self._rich.is_terminal:
            self._console.say(line + (f"  {state.reason}" if state.reason else ""))
        self._last_lines[number] = line

    def _handle_no_answer(self, error: Unreachable | DreamBoothError) -> bool:
        """Print the error of a failed poll or submission, and return False. Print repeated errors only once.

        Because the error is not raised, an error of a single job does not prevent polling the other jobs.

        Raises:
            UserError: the backend has not answered any request for too long (see `Unreachable.patience`).
        """
        silence = self._clock() - self._last_answer
        if silence >= getattr(error, "patience", Unreachable.patience):
            since = f"; the last answer came {silence / 60:.0f} minutes ago" if silence >= 60 else ""
            raise UserError(f"{error}{since}\n{self._describe_running_jobs()}")
        if str(error) not in self._printed_errors:
            self._console.say(f"{error}; the jobs continue to run, trying again")
            self._printed_errors.add(str(error))
        return False

    # -- jobs that are still running when run() ends early ----------------------------------------------------------

    def _running(self) -> list[int]:
        """Return the indices of the jobs that may cost money.

        Jobs that have been submitted, but may not have started, come last.
        """
        return sorted((number for number, state in enumerate(self.states) if state.may_be_billed),
                      key=lambda number: self.states[number].status == SUBMITTING)

    def _stop_jobs(self) -> str:
        """Stop every running job, and return a message with the outcome.

        If the user presses Ctrl-C meanwhile, the jobs that have not been stopped yet are skipped.
        """
        running = self._running()
        left = running[:]
        with suppress(KeyboardInterrupt):
            for number in running:
                with suppress(Unreachable, DreamBoothError):
                    if self._backend.stop(self.jobs[number]) or self.states[number].status != SUBMITTING:
                        left.remove(number)
        message = f"{counted(len(running) - len(left), 'job')} asked to save and stop"
        return "\n  ".join([message + ("; these may still be running, to stop them type" if left else ""),
                            *self._stop_commands(left)])

    def _describe_running_jobs(self) -> str:
        running = self._running()
        if not running:
            return f"no jobs are running: {self._follow_hint}"
        return "\n  ".join([f"{counted(len(running), 'job')} still running: {self._follow_hint}; to stop them type",
                            *self._stop_commands(running)])

    def _stop_commands(self, numbers: Sequence[int]) -> list[str]:
        return [self._backend.stop_command(self.jobs[number]) + (
            "  # it may have started" if self.states[number].status == SUBMITTING else "") for number in numbers]

    def _table(self) -> Table:
        columns = (Column(name, overflow="fold") for name in COLUMNS)  # truncated names could be equal
        table = Table(*columns, box=None, pad_edge=False)
        for job, state in zip(self.jobs, self.states, strict=True):
            table.add_row(*map(Text, table_row(job, state)))  # Text prevents rich from parsing overrides as markup
        return table


def table_row(job: Job, state: JobState) -> tuple[str, ...]:
    """Return the cells of a job's row in the live table, in the order of COLUMNS."""
    cost = state.cost_usd(job)
    show_detail = state.detail and state.status not in (COMPLETED, FAILED, UNKNOWN)
    return (job.name, state.detail if show_detail else state.status,
            "" if state.step is None else f"{state.step}/{job.steps}",
            "" if state.loss is None else f"{state.loss:.4f}",
            "" if cost is None else f"${cost:.2f}" + ("" if state.billed_seconds is not None else " so far"),
            " ".join(job.overrides))
