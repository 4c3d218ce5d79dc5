"""Which processes of a task are still to be run, and how long they take."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from speed_table import Trial, read_trials

from peers.tasks import Task

RESUME_PART = 1.4  # duration of measuring a resume, divided by that of the process before it


@dataclass(frozen=True)
class Plan:
    """The measurements of a task. Finished ones are read from a file, so that a command can be repeated.

    Attributes:
        trials: JSON lines of all measurements so far. Those with other steps or threads do not count.
    """

    name: str
    task: Task
    cases: tuple[str, ...]
    threads: int
    trials: Path

    def measured(self) -> list[Trial]:
        """Return the measurements so far, including those of other cases, and errors."""
        return [trial for trial in read_trials(self.trials)
                if (trial.steps, trial.threads) == (self.task.steps, self.threads)]

    @cached_property
    def pending(self) -> list[tuple[str, int]]:
        """The case and the round of each process to run. A case that ended with an error is tried again."""
        finished = {(trial.case, trial.round) for trial in self.measured() if not trial.error}
        return [(case, number) for number in range(1, self.task.rounds + 1) for case in self.cases
                if (case, number) not in finished]

    def seconds(self) -> float:
        """Return the expected duration of the pending processes, from earlier rounds where there are some."""
        known: dict[str, list[float]] = {}
        for trial in self.measured():
            known.setdefault(trial.case, []).append(trial.seconds / self._processes)
        failed = {trial.case for trial in self.measured() if trial.error} - {
            trial.case for trial in self.measured() if not trial.error}
        return sum((median(known[case]) if case in known else self.task.seconds) * self._processes
                   for case, number in self.pending if case not in failed or number == 1)

    @property
    def _processes(self) -> float:
        """The duration of a trial in units of its first process."""
        return 1 + RESUME_PART * self.task.resume

    def describe(self) -> str:
        """Return one line for the user."""
        total = len(self.cases) * self.task.rounds
        return (f"{self.name}: {self.task.steps} steps, {self.task.rounds} rounds, {len(self.pending)} of {total} "
                f"measurements to make, about {self.seconds() / 60:.0f} minutes")
