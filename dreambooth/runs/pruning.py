"""The interface between a training run and a search that may end it early.

A sweeper sets `reporter` before it starts a run in this process. The run reports each value of the measure, and ends if
the reporter says so. A run that no sweeper has started has no reporter. This module knows nothing of Optuna.

A run in a job of its own prints each value if the environment variable VARIABLE is set. The launcher reads the lines,
and stops the job if the search says so.
"""

import os
from dataclasses import dataclass
from typing import Protocol

from dreambooth.errors import Interrupted

VARIABLE = "DREAMBOOTH_PRUNE_MEASURE"  # set for jobs; the measure, or OBJECTIVE
OBJECTIVE = "objective"  # value of VARIABLE: the measure of the run's objective, or the held-out loss
LINE = "reported step={} value={}"  # what a job prints
PRUNED_FILE = "pruned.json"  # in the run folder of a run that ended early: the step, and why


class Pruned(Interrupted):
    """A search has ended the run early. The run is saved, and its own command continues it."""


class Reporter(Protocol):
    """Receives the values of a run."""

    @property
    def measure(self) -> str | None:
        """The measure to report, as in evaluate.select; None: that of the run's objective, or the held-out loss."""

    def report(self, step: int, value: float) -> bool:
        """Record a value; lower is better. Return whether the run has to end now."""


@dataclass
class _Active:
    reporter: Reporter | None = None


_active = _Active()


def set_reporter(reporter: Reporter | None) -> None:
    """Set the reporter of the next run in this process; None: there is none."""
    _active.reporter = reporter


def get_reporter() -> Reporter | None:
    """Return the reporter of the run in this process, or None."""
    measure = os.environ.get(VARIABLE)
    return _active.reporter or (PrintingReporter(None if measure == OBJECTIVE else measure) if measure else None)


@dataclass
class PrintingReporter:
    """Reporter of a run in a job: prints each value, and never ends the run."""

    measure: str | None

    def report(self, step: int, value: float) -> bool:
        print(LINE.format(step, f"{value:.8g}"), flush=True)
        return False
