"""Sweeps with several objectives: the Pareto front in the table, on the page, in the terminal; promotion by a rule."""

import csv
import json
import random
import re
import shlex
from pathlib import Path

import pytest

from dreambooth.cloud.job import COMPLETED, Job, JobState
from dreambooth.cloud.sweep_results import describe_front, next_commands, pareto_front, result_rows, returned_value
from dreambooth.config.enums import Direction
from dreambooth.config.evaluate import Evaluate, better_direction, require_one_objective
from dreambooth.errors import UserError
from dreambooth.runs import report
from dreambooth.sweeps import summary
from dreambooth.sweeps.front_rules import parse_rule
from dreambooth.sweeps.html_page import render_page
from dreambooth.sweeps.promotion import PromotionOptions, promote
from dreambooth.sweeps.trials import find_trials
from dreambooth.utils.atomic_files import write_json
from tests.support.runs import Registry, trial

BOTH = "subject_similarity,class_drift"
POINTS = {"close": (0.60, 0.20), "middle": (0.50, 0.10), "worse": (0.49, 0.12), "far": (0.42, 0.02)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sweep of four finished runs with two objectives; "worse" is not on the front."""
    for name, (subject, drift) in POINTS.items():
        folder = trial(tmp_path, name, -subject, evaluate__objective=BOTH, train__seed=name)
        result = json.loads((folder / "result.json").read_text())
        result["scores"] |= {"subject_similarity_efficientnet_lite0": subject, "class_drift_efficientnet_lite0": drift}
        write_json(folder / "result.json", result)
    trial(tmp_path, "unfinished", 0.0, done=False, evaluate__objective=BOTH)
    return tmp_path


@pytest.mark.parametrize("points, front", [
    ([(1, 1), (2, 2), (0, 0)], [True, True, True]),  # more of both: one is better, the other worse
    ([(1, 1), (1, 2), (2, 1)], [False, False, True]),
    ([(1, 1), (1, 1)], [True, True]),  # equal points
])
def test_a_point_is_on_the_front_unless_another_dominates_it(
        points: list[tuple[float, float]], front: list[bool]) -> None:
    assert pareto_front(points, [Direction.max, Direction.min]) == front


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_front_is_what_a_comparison_of_all_pairs_finds(objectives: int) -> None:
    draw = random.Random(objectives)
    points = [tuple(draw.choice((0.0, 0.1, 0.2, draw.random())) for _ in range(objectives)) for _ in range(300)]
    directions = [Direction.max, Direction.min, Direction.max][:objectives]

    def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        gains = [(a - b) * (1 if direction is Direction.max else -1)
                 for a, b, direction in zip(one, other, directions, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    assert pareto_front(points, directions) == [not any(dominates(other, point) for other in points)
                                                for point in points]


@pytest.mark.parametrize("value", [0.1, 0.30000000000000004, 123.45678, 98765.4321, -0.00012345, 2.5e-9, -1e6 / 3])
@pytest.mark.parametrize("name", ["class_drift", "diversity"])
def test_the_printed_rule_admits_the_run_it_was_made_from(name: str, value: float) -> None:
    row = {"job": "j", "number": 0, "objective": 0.5, "objectives": {"subject_similarity": 0.5, name: value}}
    [word] = [word for word in shlex.split(next_commands("s", Path("runs"), [row])[1]) if word.startswith("rule=")]
    [condition] = parse_rule(word.partition("=")[2].strip("'"))
    assert value <= condition.bound if condition.sign == "<=" else value >= condition.bound
    assert condition.name == name and abs(condition.bound - value) < 1.1e-4 + 1e-4 * abs(value)


def test_several_objectives_are_a_list_and_each_has_its_direction() -> None:
    assert Evaluate(objective=["subject_similarity", "class_drift"]).objective == BOTH
    assert [better_direction(name).value for name in ("clip_i", "class_drift_dino", "dino+pres", "instance_loss")] == [
        "max", "min", "max", "min"]
    with pytest.raises(ValueError, match=r"evaluate\.objective must be .* not class_drift,class_drift"):
        Evaluate(objective=["class_drift", "class_drift"])
    require_one_objective("dino+class_drift")
    with pytest.raises(UserError, match=r"workflows compare runs by one: type evaluate\.objective=ONE"):
        require_one_objective(BOTH)


def test_table_terminal_and_page_show_the_front(root: Path) -> None:
    lines = summary.write_summary([], "s", root, kind="none", uri=None, experiment="x", reasons={})
    assert lines[:2] == ["Pareto front: 3 of 4 finished runs by subject_similarity (higher is better), class_drift "
                         "(lower is better)", "  close  subject_similarity 0.6000, class_drift 0.2000"]
    assert "'class_drift<=0.1'" in lines[-1]  # that of the middle of the front
    with (root / "results-s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["pareto"], row["class_drift"]) for row in rows] == [
        ("close", "front", "0.2"), ("middle", "front", "0.1"), ("far", "front", "0.02"), ("worse", "", "0.12"),
        ("unfinished", "", "")]
    page = render_page("s", find_trials(root, "s"), 64)
    assert page.count("<em>Pareto front</em>") == 3 and "<em>best</em>" not in page
    assert page.count("<circle") == 4 and page.count('r="7"') == 3 and "subject_similarity ↑" in page


@pytest.mark.parametrize("drift", [None, float("nan")])
def test_a_run_without_one_of_the_objectives_is_not_on_the_front(drift: float | None, root: Path) -> None:
    folder = trial(root, "lacking", -0.7, evaluate__objective=BOTH, train__seed="lacking")
    result = json.loads((folder / "result.json").read_text())
    result["scores"] |= {"subject_similarity_efficientnet_lite0": 0.7}
    if drift is not None:
        result["scores"]["class_drift_efficientnet_lite0"] = drift
    (folder / "result.json").write_text(json.dumps(result))
    lines = summary.write_summary([], "s", root, kind="none", uri=None, experiment="x", reasons={})
    assert lines[0].startswith("Pareto front: 3 of 5 finished runs") and "'class_drift<=0.1'" in lines[-1]
    page = render_page("s", find_trials(root, "s"), 64)
    assert page.count("<em>Pareto front</em>") == 3 and page.count("<circle") == 4


def test_a_rule_chooses_one_run_of_the_front(root: Path, registry: Registry) -> None:
    def promoted(rule: str | None, **options: bool) -> str:
        record = promote("s", root, PromotionOptions(rule=rule, **options))
        assert record["rule"] == rule and f"by the rule {rule}" in report.promotion_message(record)
        return str(record["run"])

    with pytest.raises(UserError, match=r"several objectives \(subject_similarity, class_drift\): type .*drift<=0"):
        promote("s", root, PromotionOptions())
    assert promoted("class_drift<=0.1") == "middle"
    assert registry.versions[0].tags["rule"] == "class_drift<=0.1"
    with pytest.raises(UserError, match=re.escape("was chosen by the rule class_drift<=0.1: type")):
        promoted("class_drift<=0.3")
    assert promoted("class_drift<=0.3", replace=True) == "close"
    assert promoted("subject_similarity>=0.45", replace=True) == "middle"  # the least drift
    with pytest.raises(UserError, match=re.escape("far has class_drift 0.02, and the rule is class_drift<=0.01")):
        promoted("class_drift<=0.01", replace=True)


@pytest.mark.parametrize("rule", ["class_drift<0.1", "class_drift", "beauty<=1", "class_drift<=1..5", ""])
def test_a_wrong_rule_is_refused_in_one_sentence(rule: str) -> None:
    with pytest.raises(UserError, match=r"^rule (names beauty, which is no measure|must be conditions such as)"):
        parse_rule(rule)


def test_jobs_of_a_launcher_return_all_objectives() -> None:
    states = [JobState(COMPLETED, result={"objective": -values[0], "objectives": dict(zip(BOTH.split(","), values,
              strict=True))}) for values in POINTS.values()]
    assert [returned_value(state) for state in states] == [list(values) for values in POINTS.values()]
    assert returned_value(JobState(COMPLETED, result={"objective": 1.0, "objectives": {"dino": None}})) is None
    jobs = [Job(number, name, (), {}, 4) for number, name in enumerate(POINTS)]
    rows = result_rows(jobs, states)
    assert [line.split()[0] for line in describe_front(rows)[1:]] == ["close", "middle", "far"]
    assert "rule" not in next_commands("s", Path("runs"), [row | {"objectives": {}} for row in rows])[1]
