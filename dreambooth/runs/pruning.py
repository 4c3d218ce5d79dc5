"""The interface between a training run and a search that may end it early.

A sweeper sets `reporter` before it starts a run in this process. The run reports each value of the measure, and ends if
the reporter says so. A run that no sweeper has started has no reporter. This module knows nothing of Optuna.
"""

from dataclasses import dataclass
from typing import Protocol

from dreambooth.errors import Interrupted

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
    return _active.reporter
