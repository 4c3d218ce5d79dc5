"""The budget of a run on this machine: predicted before, counted over its sessions, and kept by a stop request."""

import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dreambooth.budgets import run_budget
from dreambooth.config.hardware import Budget, Hardware, RunBudget, budget_problems
from dreambooth.config.recipe import Recipe
from dreambooth.errors import DoesNotFit, Interrupted
from dreambooth.planner import auto_memory
from dreambooth.planner.time_and_cost import Estimate, seconds_with_interruptions
from dreambooth.runs import budget_file
from dreambooth.runs.budget_file import used_hours
from dreambooth.runtime.engine import Engine
from dreambooth.sweeps.launched_jobs import study_jobs
from dreambooth.training import checkpoint
from dreambooth.utils import atomic_files
from dreambooth.utils.signals import StopRequest
from tests.support import faults
from tests.support.configs import small_recipe
from tests.support.toy_model import ToyModel, make_state


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run_budget, "_sweep", {})
    yield


def recipe_of(folder: Path, **limits: float) -> Recipe:
    return replace(small_recipe(), run_dir=folder, budget=RunBudget(**limits))


def use(recipe: Recipe, hours: float) -> None:
    """Write what earlier sessions of a run have used."""
    atomic_files.write_json(recipe.run_dir / "budget.json", {"hours": hours})


def test_a_run_without_a_budget_writes_no_file(tmp_path: Path) -> None:
    with run_budget.limit_run(recipe_of(tmp_path), StopRequest(), Engine(), None):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_reaches_its_budget_is_asked_to_stop_and_its_next_session_goes_on_counting(tmp_path: Path) -> None:
    recipe, stop = recipe_of(tmp_path, max_hours=2.0), StopRequest()
    use(recipe, 2 - 0.02 / 3600)
    with run_budget.limit_run(recipe, stop, Engine(), None):
        time.sleep(0.05)
    assert stop.signal_name == "budget.max_hours=2 is used up (type a higher value to continue)"
    assert 2 < used_hours(tmp_path) < 2.001
    with pytest.raises(DoesNotFit, match=r"budget.max_hours=2 is used up \(2 h\): type a higher budget.max_hours"), \
            run_budget.limit_run(recipe, StopRequest(), Engine(), None):
        pass


def test_a_limit_in_dollars_is_hours_at_the_price_of_the_machine() -> None:
    assert Budget(max_usd=3.0, max_hours=9.0).hours(0.5) == (6.0, "budget.max_usd=3")
    assert Budget(max_usd=3.0, max_hours=5.0).hours(0.5) == (5.0, "budget.max_hours=5")


def test_runs_of_a_sweep_share_one_budget(tmp_path: Path) -> None:
    first, second = (recipe_of(tmp_path / name, max_hours=2.0) for name in ("a", "b"))
    use(first, 2.5)
    run_budget.count_finished(first)
    with pytest.raises(Interrupted, match="is used up"), run_budget.limit_run(second, StopRequest(), Engine(), None):
        pass


def test_a_continued_study_counts_the_runs_of_its_earlier_commands(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that both commands have, such as a repeated point, counts once."""
    earlier, again = (recipe_of(tmp_path / name, max_hours=2.0) for name in ("earlier", "again"))
    use(earlier, 1.5)
    use(again, 0.6)
    monkeypatch.setattr(study_jobs, "earlier_runs", [earlier.run_dir, again.run_dir])
    with pytest.raises(Interrupted, match=r"budget.max_hours=2 is used up \(2.1 h\)"), \
            run_budget.limit_run(again, StopRequest(), Engine(), None):
        pass


def test_a_killed_session_counts_until_its_last_metrics(tmp_path: Path) -> None:
    began = time.time() - 7200
    atomic_files.write_json(tmp_path / "budget.json", {"hours": 1.0, "began": began})
    (tmp_path / "metrics.jsonl").touch()
    os.utime(tmp_path / "metrics.jsonl", (began, began + 1800))
    assert used_hours(tmp_path) == pytest.approx(1.5)


def test_another_machine_goes_on_counting_from_the_hours_in_the_checkpoint(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "first", max_hours=2.0)
    use(recipe, 1.5)
    with run_budget.limit_run(recipe, StopRequest(), Engine(), None):
        entry = budget_file.checkpoint_entry(recipe.run_dir)
        state = make_state(ToyModel())
        saved = checkpoint.save(recipe.run_dir / "checkpoints", state, state.model, Engine().scaler, 1)
    assert 1.5 <= entry["budget_hours"] < 1.51
    start = shutil.copytree(saved, tmp_path / "second/checkpoints" / saved.name)
    assert used_hours(tmp_path / "second") == 0
    run_budget._sweep.clear()  # in this process, both runs would be those of a sweep
    with run_budget.limit_run(recipe_of(tmp_path / "second", max_hours=2.0), StopRequest(), Engine(), start):
        pass
    assert 1.5 <= used_hours(tmp_path / "second") < 1.51
    assert budget_file.checkpoint_entry(tmp_path / "without a budget") == {}


def test_a_run_is_refused_by_its_plan_and_a_resumed_one_by_what_is_left_of_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, max_hours=1.0)
    recipe = replace(recipe, hardware=Hardware(gpu="T4", price_usd_hour=1.0))
    plan = Estimate(36.0, 36.0 * recipe.train.max_train_steps + 120, 9.0, None)
    monkeypatch.setattr(auto_memory, "choose_memory_options",
                        lambda recipe, processes: SimpleNamespace(recipe=recipe, prediction=None))
    monkeypatch.setattr(run_budget, "estimate", lambda recipe, prediction, card: plan)
    hours = (plan.run_seconds or 0) / 3600
    recipe = replace(recipe, budget=RunBudget(max_hours=hours * 0.9))
    with pytest.raises(DoesNotFit, match=f"does not fit this run, which needs about {hours:.3g} h: type budget"), \
            run_budget.limit_run(recipe, StopRequest(), Engine(), None):
        pass
    half = tmp_path / f"step-{recipe.train.max_train_steps // 2:06}"
    use(recipe, 0.01)
    with run_budget.limit_run(recipe, StopRequest(), Engine(), half):
        pass


def test_a_deadline_ends_work_that_can_be_repeated_and_a_signal_after_it_lets_the_run_save() -> None:
    stop = StopRequest()
    with pytest.raises(Interrupted, match="used up: stopped before the first step"), stop.deadline(0.01, "used up"), \
            stop.at_once():
        time.sleep(5)
    stop.receive(15)  # the first signal: the run is saving already
    with pytest.raises(KeyboardInterrupt):
        stop.receive(15)


@pytest.mark.parametrize("per_hour", [0.5, 6.0])
def test_the_expected_time_on_spot_instances_is_the_mean_of_simulated_runs(per_hour: float) -> None:
    """A run of 2 h that is saved every 10 minutes and needs 2 minutes to start again, 4000 times."""
    work, interval, restart, chance = 7200.0, 600.0, 120.0, random.Random(0)

    def run() -> float:
        elapsed, done = 0.0, 0.0
        while done < work:
            spent = chance.expovariate(per_hour / 3600)  # until the interruption
            start = restart if elapsed else 0.0
            intervals = min((spent - start) // interval if spent > start else 0, (work - done) // interval)
            done += intervals * interval
            elapsed += spent if done < work else start + intervals * interval
        return elapsed

    mean = sum(run() for _ in range(4000)) / 4000
    assert seconds_with_interruptions(work, interval, restart, per_hour) == pytest.approx(mean, rel=0.05)
    assert seconds_with_interruptions(work, interval, restart, 0.0) == work


@pytest.mark.parametrize("limits, hardware, typed", [
    ({"max_usd": 5.0}, {}, "hardware.price_usd_hour=PRICE, or budget.max_hours=HOURS"),
    ({"interruptions_per_hour": 0.1}, {"price_usd_hour": 1.0}, "hardware.spot_price_usd_hour=PRICE"),
    ({"max_usd": 5.0, "interruptions_per_hour": 0.1}, {"spot_price_usd_hour": 1.0}, "")])
def test_a_limit_needs_the_price_that_it_is_about(
        limits: dict[str, float], hardware: dict[str, float], typed: str) -> None:
    assert typed in "".join(budget_problems(RunBudget(**limits), Hardware(**hardware))) + "|" * (not typed)
    assert bool(typed) == bool(list(budget_problems(RunBudget(**limits), Hardware(**hardware))))


@pytest.mark.slow
def test_a_run_stops_at_its_budget_saved_and_continues_with_a_higher_one(tmp_path: Path) -> None:
    words = ("sample.every=null", "checkpoint.every=null", "train.max_train_steps=4000")
    log = tmp_path / "log"
    assert faults.train(tmp_path, *words, "budget.max_hours=0.002", log=log) == Interrupted.exit_code
    text = log.read_text()
    assert "budget.max_hours=0.002 is used up (type a higher value to continue): stopped and saved after step" in text
    [checkpoint] = tmp_path.glob("*/checkpoints/step-*")
    assert faults.train(tmp_path, *words, "budget.max_hours=0.002", log=log) == DoesNotFit.exit_code
    step = int(checkpoint.name[5:])
    assert faults.train(tmp_path, *words[:-1], f"train.max_train_steps={step + 2}", "budget.max_hours=1", log=log) == 0
    assert f"resuming after step {step}" in log.read_text()
