"""Keeps the budget of a run: refuses a run that is predicted to pass it, and stops a run that reaches it.

A resumed run goes on counting (runs/budget_file.py). The runs of a sweep in this process share one budget, together
with the runs of earlier commands if the sweep is a study of Optuna.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dreambooth.config.recipe import Recipe
from dreambooth.errors import DoesNotFit, Interrupted, OverBudget
from dreambooth.planner import auto_memory
from dreambooth.planner.gpu_specs import find_card
from dreambooth.planner.time_and_cost import START_UP, budgeted, estimate
from dreambooth.runs import budget_file
from dreambooth.runtime.engine import Engine
from dreambooth.sweeps import launched_jobs
from dreambooth.utils import atomic_files
from dreambooth.utils.signals import StopRequest

_sweep: dict[Path, tuple[float, float]] = {}  # folder -> hours and US dollars, of the runs of a sweep in this process


def count_finished(recipe: Recipe) -> None:
    """Add the hours of a finished run, which the command does not repeat, to those of its sweep."""
    if recipe.budget.limits:
        _count(recipe, budget_file.used_hours(recipe.run_dir))


@contextmanager
def limit_run(recipe: Recipe, stop: StopRequest, engine: Engine, start: Path | None) -> Iterator[None]:
    """Context manager of a run with a budget. When the budget is used up, it requests a stop, as SIGTERM does.

    Args:
        stop: records the request.
        engine: its main process checks the plan, and writes the file.
        start: the checkpoint from which the run resumes; None: it begins.

    Raises:
        DoesNotFit: the run is predicted to need more than is left of the budget.
        OverBudget: the same, of a resumed run.
        Interrupted: the same, and earlier runs of the sweep have used a part of the budget. The sweep ends.
    """
    if not recipe.budget.limits:
        yield
        return
    price = _price(recipe)
    before = budget_file.used_hours(recipe.run_dir, start)
    _count(recipe, before)
    engine.run_on_main(partial(_check, recipe, start, before, engine.world_size))
    allowed, limit = recipe.budget.hours(price)
    left = allowed - _used_by_others(recipe)[0] - before
    began, clock = time.time(), time.monotonic()
    if engine.is_main_process:
        budget_file.write(recipe.run_dir, before, began)
    try:
        with stop.deadline(3600 * left, f"{limit} is used up (type a higher value to continue)"):
            yield
    finally:
        hours = before + (time.monotonic() - clock) / 3600
        _count(recipe, hours)
        if engine.is_main_process:
            budget_file.write(recipe.run_dir, hours)


def _check(recipe: Recipe, start: Path | None, before: float, processes: int) -> None:
    """Raise DoesNotFit if the rest of the run needs more than is left of the budget; Interrupted in a sweep.

    Args:
        before: hours that the run has used.
    """
    usd, hours = 0.0, 0.0
    if card := find_card(recipe.hardware.gpu):
        choice = auto_memory.choose_memory_options(recipe, processes=processes)
        time = estimate(choice.recipe, choice.prediction, card)
        cost, needed = budgeted(choice.recipe, time)
        share = 1.0
        if start is not None and time.run_seconds and time.step_seconds:  # what is left of a resumed run
            steps = max(0, recipe.train.max_train_steps - atomic_files.trailing_number(start))
            share = min(1.0, (START_UP + steps * time.step_seconds) / time.run_seconds)
        usd, hours = share * (cost or 0.0), share * (needed or 0.0)
    other_hours, other_usd = _used_by_others(recipe)
    least = 1e-9  # a run whose time is unknown needs something, too
    if problem := recipe.budget.shortfall("run", [max(usd, least)], [max(hours, least)],
                                          other_usd + before * (_price(recipe) or 0.0), other_hours + before):
        # Interrupted ends a sweep, which can be continued.
        raise (Interrupted if other_hours else OverBudget if before else DoesNotFit)(problem)


def _count(recipe: Recipe, hours: float) -> None:
    _sweep[recipe.run_dir] = hours, hours * (_price(recipe) or 0.0)


def _used_by_others(recipe: Recipe) -> tuple[float, float]:
    """Return the hours and the US dollars of the other runs of the sweep."""
    for run_dir in launched_jobs.study_jobs.earlier_runs:
        if run_dir not in _sweep:
            hours = budget_file.used_hours(run_dir)
            _sweep[run_dir] = hours, hours * (_price(recipe) or 0.0)
    others = [used for run_dir, used in _sweep.items() if run_dir != recipe.run_dir]
    return sum(hours for hours, _ in others), sum(usd for _, usd in others)


def _price(recipe: Recipe) -> float | None:
    """Return the price per hour of the machine in US dollars; None: unknown."""
    hardware = recipe.hardware
    on_spot = recipe.budget.interruptions_per_hour is not None
    return hardware.spot_price_usd_hour if on_spot else hardware.price_usd_hour
