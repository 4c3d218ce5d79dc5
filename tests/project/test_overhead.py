"""The benchmarks of a step and a start: tables, pairs, and what is exchanged between the steps of a pair."""

import importlib
import inspect
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("overhead")


def test_a_step_is_divided_by_the_bare_step_that_follows_it(overhead: ModuleType) -> None:
    bare = [(9.0, 9.0)] + [(1.0, 0.5), (2.0, 1.0)] * 2  # the machine is slow every other step
    ours = [(1.0, 1.0)] + [(1.1, 0.5), (2.2, 1.0)] * 2  # the first pair warms up
    rows = overhead.loop_rows("tiny", bare, ours)
    assert rows == ["| tiny | wall | 4 | 1500.0 | 1650.0 | 1.100 | 1.100-1.100 |",
                    "| tiny | CPU | 4 | 750.0 | 750.0 | 1.000 | 1.000-1.000 |"]


def test_the_start_of_the_demo_is_compared_with_the_imports_of_the_same_round(overhead: ModuleType) -> None:
    rows = overhead.start_rows([(4.0, 3.0), (8.0, 3.0)], [(6.0, 4.5), (9.0, 4.0)])
    assert rows[2:] == ["| wall | 2 | 6.00 | 7.50 | 1.50 | 1.00-2.00 |", "| CPU | 2 | 3.00 | 4.25 | 1.25 | 1.00-1.50 |"]


def test_a_gain_is_measured_within_a_round(overhead: ModuleType) -> None:
    row = overhead.tuning_row("tiny", "malloc", [(1.0, 0.9), (2.0, 1.0), (4.0, 3.0)])
    assert row == "| malloc | tiny | 3 | 2.000 | 1.000 | 25.0% | 10.0% to 50.0% |"


@pytest.fixture
def commands(overhead: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of each call of run_trial, which runs no process and returns 8 images/s, or 4 with own variables."""
    run_trial = importlib.import_module("peers.trials").run_trial
    calls: list[dict[str, Any]] = []

    def record(*arguments: Any) -> Any:
        calls.append(call := inspect.signature(run_trial).bind(*arguments).arguments)
        rate = 4.0 if call["trainer"].environment else 8.0
        return replace(call["trial"], images_per_second=rate, images_per_cpu=rate / 2)

    monkeypatch.setattr(overhead, "run_trial", record)
    monkeypatch.setattr(overhead, "prepare", lambda task, work: None)
    return calls


def test_each_round_runs_without_and_with_a_setting(
        overhead: ModuleType, commands: list[dict[str, Any]], tmp_path: Path) -> None:
    pairs = overhead.measure_tuning("tiny", overhead.MALLOC, 6, 2, tmp_path)
    assert pairs == [(4.0, 2.0)] * 2  # 4 photos and 4 class images per step
    assert [call["task"].steps for call in commands] == [6] * 4
    assert [call["trial"].round for call in commands] == [0, 0, 1, 1]


def test_a_step_is_measured_for_each_spin_count_alone_and_beside_a_busy_process(
        overhead: ModuleType, commands: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours: list[bool] = []
    monkeypatch.setattr(overhead, "busy_neighbour", lambda exists: neighbours.append(exists) or nullcontext())
    rows = overhead.spinning_rows(overhead.measure_spinning(2, tmp_path))
    counts = [call["trainer"].environment["GOMP_SPINCOUNT"] for call in commands]
    assert neighbours == [False, True] and counts == [str(count) for count in overhead.SPIN_COUNTS] * 4
    assert rows[2] == "| alone |" + " 2000 (2000-2000) |" * len(overhead.SPIN_COUNTS)


def test_the_settings_that_are_measured_are_those_that_a_user_may_set(overhead: ModuleType) -> None:
    from dreambooth.runtime import cpu_tuning

    own = {*cpu_tuning.MALLOC_SETTINGS, *cpu_tuning.openmp_environment()}
    assert all(variables.keys() <= own for variables in overhead.WITHOUT.values())
    assert {setting for setting, *_ in overhead.TUNING} == overhead.WITHOUT.keys()


@pytest.mark.slow
def test_the_overhead_of_the_loop_is_measured_with_adapters_too(overhead: ModuleType, tmp_path: Path) -> None:
    bare, ours = overhead.measure_loop("flow_lora", 2, tmp_path)
    assert len(bare) == len(ours) == 2 and all(seconds > 0 for pair in bare + ours for seconds in pair)


@pytest.mark.slow
def test_steps_without_a_form_and_with_it_alternate(
        overhead: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth.models.layers.rms_norm import LeanRMSNorm, RMSNorm

    seen: list[tuple[set[type], bool]] = []

    def bare_step(setup: Any, batch: Any, clip: Any = None) -> None:
        seen.append(({type(layer) for layer in setup.trained.modules() if isinstance(layer, RMSNorm)}, bool(clip)))

    monkeypatch.setattr(overhead, "bare_step", bare_step)
    plain, ours = overhead.measure_form("flow_lora", LeanRMSNorm, 2, tmp_path)
    assert (len(plain), len(ours)) == (2, 2)
    assert seen == [({RMSNorm}, False), ({LeanRMSNorm}, False)] * 2
    seen.clear()
    overhead.measure_form("flow_lora", None, 1, tmp_path)
    assert seen == [({LeanRMSNorm}, False), ({LeanRMSNorm}, True)]


@pytest.mark.slow
def test_each_1x1_convolution_is_measured_and_those_kept_as_convolutions_are_marked(overhead: ModuleType) -> None:
    pointwise = importlib.import_module("pointwise")
    rows = list(pointwise.table_rows(1, 1))[2:]
    tiny, full = ([row for row in rows if row.startswith(f"| {name} ")] for name in ("tiny", "sd15"))
    layers = pointwise.count_layers("tiny", 64)
    assert sum(layers.values()) == 22 and len(tiny) == len(layers) + 1
    assert not any("x 4 *" in row or "x 8 *" in row for row in tiny)
    assert [row for row in full if "| 1280 to 1280 | 8 x 8 * |" in row]
