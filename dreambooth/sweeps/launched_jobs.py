"""What launchers and a search tell each other about jobs of other processes, in addition to Hydra's JobReturn.

A sweeper sets `search`. Launchers ask it whether a running job is to be stopped, and record jobs that somebody stopped
or that the search has ended, and what jobs have cost.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from dreambooth.cloud.job import Search


@dataclass
class StudyJobs:
    """The jobs of the search that this process runs."""

    search: Search | None = None  # None: no job is pruned
    stopped: dict[int, str] = field(default_factory=dict)  # number of a job that waits to be continued -> why it ended
    pruned: set[int] = field(default_factory=set)  # numbers of jobs that the search has ended, and of their copies
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)  # job -> US dollars, hours; of the whole study
    earlier_runs: list[Path] = field(default_factory=list)  # folders of the study's runs that ended before this command


study_jobs = StudyJobs()


def spent(except_for: Collection[str]) -> tuple[float, float]:
    """Return US dollars and hours of the jobs of a study, without those that are named."""
    costs = [cost for name, cost in study_jobs.costs.items() if name not in except_for]
    return sum(usd for usd, _ in costs), sum(hours for _, hours in costs)
