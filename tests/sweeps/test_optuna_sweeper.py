"""`hydra/sweeper=optuna`: Hydra's test suites, samplers, studies that are continued, and wrong settings."""

import csv
import math
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from omegaconf import OmegaConf
from pytest import MonkeyPatch, mark, raises

from dreambooth.errors import ConfigError, UserError
from dreambooth.runs import pruning
from hydra_plugins.dreambooth_optuna import _core
from hydra_plugins.dreambooth_optuna.sweeper import OptunaSweeper
from tests.support.services import postgres
from tests.support.warm_python import PYTHON

GRID = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=10"]


def test_hydra_finds_the_sweeper() -> None:
    assert OptunaSweeper.__name__ in [plugin.__name__ for plugin in Plugins.instance().discover(Sweeper)]


@mark.parametrize("launcher_name, overrides", [("basic", [*GRID, "hydra.job.chdir=true"])])
class TestSweeper(LauncherTestSuite):
    """Hydra's own test suite, in which a grid of Optuna takes the place of the basic sweeper."""


@mark.slow  # twelve processes
@mark.parametrize("task_launcher_cfg, extra_flags", [({}, ["-m", "hydra/launcher=basic", *GRID])])
class TestSweeperIntegration(IntegrationTestSuite):
    """Hydra's own test suite."""


STUB = """
import os, signal
from dreambooth import train

def job(cfg, *args):
    with open("runs.txt", "a") as file:
        print(cfg.train.learning_rate, cfg.train.seed, file=file)
    if os.environ.get("KILL") == str(len(open("runs.txt").readlines())):
        os.kill(os.getpid(), signal.SIGKILL)
    distance = abs(cfg.train.learning_rate - 1e-4)
    return [distance, cfg.train.seed] if "class_drift" in str(cfg.evaluate.objective) else distance + cfg.train.seed

train._job = job
train.main()
"""


def stub_sweep(folder: Path, *words: str, kill: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a sweep whose trials train nothing. The process kills itself in the trial `kill`, counted from 1."""
    folder.mkdir(exist_ok=True)
    return subprocess.run([PYTHON, "-c", STUB, "-m", "hydra/sweeper=optuna", "tracking=none", f"run_root={folder}",
                           *words], capture_output=True, text=True, check=False, cwd=folder,
                          env=os.environ | {"KILL": str(kill)})


@mark.slow
@mark.parametrize("words", [
    ["hydra.sweeper.sampler.n_startup_trials=2"],
    ["hydra/sweeper/sampler=cmaes", "hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=mine"],
    ["hydra/sweeper/sampler=nsgaii", "hydra.sweeper.sampler.population_size=2", "hydra.sweeper.storage=sqlite:///s.db",
     "evaluate.objective=[instance_loss,class_drift]"],
], ids=["tpe-journal", "cmaes-sqlite", "two-objectives"])
def test_a_study_that_was_killed_continues_as_if_nothing_had_happened(words: list[str], tmp_path: Path) -> None:
    """kill -9 in the second of two trials of a batch: its settings are run again, and no others."""
    words = ["train.learning_rate=tag(log,interval(1e-5,1e-3))", "train.seed=choice(0,1,2)", "hydra.sweeper.n_trials=7",
             "hydra.sweeper.sampler.seed=3", *words]
    whole = stub_sweep(tmp_path / "whole", *words)
    assert whole.returncode == 0, whole.stderr
    words = [word.replace("whole", "killed") for word in words]
    assert stub_sweep(tmp_path / "killed", *words, kill=4).returncode == -signal.SIGKILL
    again = stub_sweep(tmp_path / "killed", *words)
    assert again.returncode == 0, again.stderr
    expected = (tmp_path / "whole/runs.txt").read_text().splitlines()
    runs = (tmp_path / "killed/runs.txt").read_text().splitlines()
    assert runs == [*expected[:4], *expected[3:]]
    results = [(tmp_path / name / "optimization_results.yaml").read_text() for name in ("whole", "killed")]
    assert results[0] == results[1]
    finished = stub_sweep(tmp_path / "killed", *words)
    assert "has 7 trials already: type a larger hydra.sweeper.n_trials" in finished.stdout, finished.stderr
    assert len((tmp_path / "killed/runs.txt").read_text().splitlines()) == 8


@mark.services
def test_a_study_in_postgresql_continues_after_a_kill(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    with postgres() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        words = ["hydra.sweeper.storage=postgresql://", "hydra.sweeper.study_name=mine",
                 "train.seed=choice(0,1,2)", "hydra/sweeper/sampler=grid"]
        assert stub_sweep(tmp_path, *words, kill=2).returncode == -signal.SIGKILL
        again = stub_sweep(tmp_path, *words)
        assert again.returncode == 0, again.stderr
        runs = (tmp_path / "runs.txt").read_text().split()[1::2]
        assert runs == ["0", "1", "1", "2"]


@mark.parametrize("word, sentence", [
    ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials must be 1 or more, not 0"),
    ("hydra.sweeper.n_jobs=0", "hydra.sweeper.n_jobs must be 1 or more, not 0"),
    ("hydra.sweeper.direction=up", "hydra.sweeper.direction must be minimize or maximize"),
    ("hydra.sweeper.max_failure_rate=2", "hydra.sweeper.max_failure_rate must be from 0 to 1, not 2"),
    ("hydra/sweeper/sampler=cmaes", "cmaes searches intervals, and this space has none"),
    ("hydra.sweeper.storage=oracle://db", "cannot be opened in oracle://db"),
])
def test_a_wrong_setting_of_the_sweeper_is_refused(
        word: str, sentence: str, hydra_restore_singletons: None, tmp_path: Path) -> None:
    with raises(UserError, match=re.escape(sentence)):
        run_sweep(lambda cfg: 0.0, tmp_path, "+x=choice(1,2)", word)


def run_sweep(function: Callable[[Any], Any], folder: Path, *words: str) -> Any:
    """Run a sweep of a function in this process, and return what Hydra returns."""
    GlobalHydra.instance().clear()
    with initialize_config_module("hydra.test_utils.configs", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return hydra.multirun("compose", function, ["hydra/sweeper=optuna", f"hydra.sweep.dir={folder}", *words],
                              with_log_configuration=False)


def test_a_trial_that_has_ended_is_told_before_the_next_one_begins(
        hydra_restore_singletons: None, tmp_path: Path) -> None:
    """An interrupted batch leaves one trial out, and a continued study has the points of an uninterrupted one."""
    words = ["+x=interval(0.0,1.0)", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=1",
             "hydra/sweeper/sampler=random", "hydra.sweeper.n_jobs=3"]
    points: dict[str, list[float]] = {"whole": [], "parts": []}

    def run(name: str, stop: int) -> None:
        def function(cfg: Any) -> float:
            points[name].append(cfg.x)
            if len(points[name]) == stop:
                raise SystemExit(5)
            return float(cfg.x)

        run_sweep(function, tmp_path / name, *words)

    run("whole", 0)
    with raises(SystemExit):
        run("parts", 2)
    run("parts", 0)
    assert points["parts"] == [*points["whole"][:2], *points["whole"][1:]]
    assert len(set(points["whole"])) == 6


@mark.parametrize("sampler, trials", [("grid", 4), ("tpe", 12)])
def test_a_key_is_searched_only_where_its_condition_holds(
        sampler: str, trials: int, hydra_restore_singletons: None, tmp_path: Path) -> None:
    """A rank is searched for adapters only: the grid has one point for full training, and one for each rank."""
    points: list[dict[str, Any]] = []
    run_sweep(lambda cfg: points.append(dict(cfg)) or float(cfg.get("rank", 2)), tmp_path, "+method=choice(full,lora)",
              '+rank=tag("method=lora|dora",choice(4,8,16))', f"hydra/sweeper/sampler={sampler}",
              "hydra.sweeper.n_trials=12", "hydra.sweeper.sampler.seed=0")
    assert len(points) == trials
    assert {(point["method"], point.get("rank")) for point in points} <= {
        ("full", None), ("lora", 4), ("lora", 8), ("lora", 16)}
    assert {point["method"] for point in points} == {"full", "lora"}
    with raises(UserError, match="the search space does not set method before it"):
        run_sweep(lambda cfg: 0.0, tmp_path, '+rank=tag("method=lora",choice(4,8))')


@mark.parametrize("sampler", ["nsgaii", "motpe"])
def test_a_study_of_two_objectives_keeps_its_front_and_continues(
        sampler: str, hydra_restore_singletons: None, tmp_path: Path) -> None:
    words = ["+x=interval(0.0,1.0)", "hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.sampler.seed=1",
             f"hydra/sweeper/sampler={sampler}"]
    points: list[float] = []

    def function(cfg: Any) -> list[float]:
        points.append(cfg.x)
        return [min(cfg.x, 0.5), cfg.x]  # above 0.5, a point is dominated by one nearer to 0.5

    for n_trials in (2, 4, 4):
        run_sweep(function, tmp_path, *words, f"hydra.sweeper.n_trials={n_trials}")
    assert len(set(points)) == len(points) == 4
    solutions = OmegaConf.load(tmp_path / "optimization_results.yaml").solutions
    lowest = min((x for x in points if x >= 0.5), default=1.0)
    assert {item.params["+x"] for item in solutions} == {x for x in points if x <= lowest}
    with raises(ConfigError, match="a study of several objectives cannot be pruned: type hydra/sweeper/pruner=none"):
        run_sweep(function, tmp_path, *words, "hydra/sweeper/pruner=median")
    with raises(ConfigError, match="cmaes searches one objective: type hydra/sweeper/sampler=nsgaii"):
        run_sweep(function, tmp_path, *words, "hydra/sweeper/sampler=cmaes")


@mark.parametrize("objective, given, directions, problem", [
    ("instance_loss", ["minimize"], ["minimize"], ""),
    ("subject_similarity,class_drift", ["minimize"], ["maximize", "minimize"], ""),
    ("dino+clip_i,pres", ["maximize", "minimize"], ["maximize", "minimize"], ""),
    ("subject_similarity,class_drift", ["minimize", "minimize"], ["maximize", "minimize"],
     "hydra.sweeper.direction must be [maximize,minimize]"),
    ("dino", ["maximize", "minimize"], ["maximize", "minimize"], "evaluate.objective=dino is one objective"),
    ("dino,beauty", ["minimize"], ["minimize"], "evaluate.objective names beauty, which is no measure"),
])
def test_each_objective_of_a_run_is_searched_in_its_better_direction(
        objective: str, given: list[str], directions: list[str], problem: str) -> None:
    result, found = _core._directions_of_run(objective, given)
    assert result == directions and found.startswith(problem) and bool(found) == bool(problem)


def train_sweep(folder: Path, *words: str) -> str:
    """Run a sweep that trains four steps of the tiny base model per trial. Return its output."""
    words = ("train.max_train_steps=4", "dataset.validation_count=1", "sample.every=null", "train.train_batch_size=1",
             "prior.with_prior_preservation=false", "train.use_ema=false", "hardware=cpu", "evaluate.encoder=none",
             "tracking=none", "tracking.sweep=mine", f"run_root={folder}", *words)
    done = subprocess.run([PYTHON, "-m", "dreambooth.train", "-m", *words], capture_output=True, text=True, check=False,
                          cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def statuses(folder: Path) -> dict[str, str]:
    """Return the status of each trial, by its learning rate."""
    with (folder / "results-mine.csv").open() as file:
        return {row["train.learning_rate"]: row["status"] for row in csv.DictReader(file)}


@mark.parametrize("pruner, pruned", [("none", False), ("median", False), ("percentile", True)])
def test_the_percentile_pruner_keeps_a_quarter_of_the_trials_and_the_median_pruner_a_half(
        pruner: str, pruned: bool, hydra_restore_singletons: None, tmp_path: Path) -> None:
    """The last value, 2.2, is between the first quartile of 1, 2, 3, 4 and their median."""
    ended: list[bool] = []

    def function(cfg: Any) -> float:
        reporter = pruning.get_reporter()
        ended.append(reporter is not None and reporter.report(1, cfg.x))
        return math.nan if ended[-1] else float(cfg.x)

    startup = [] if pruner == "none" else ["hydra.sweeper.pruner.n_startup_trials=4"]
    run_sweep(function, tmp_path, *GRID, "hydra.sweeper.n_jobs=1", f"hydra/sweeper/pruner={pruner}", *startup,
              "+x=choice(1.0,2.0,3.0,4.0,2.2)")
    assert ended == [False] * 4 + [pruned]


@mark.slow
def test_a_pruned_trial_keeps_its_checkpoint_and_is_continued_by_its_own_command(tmp_path: Path) -> None:
    train_sweep(tmp_path, "train.validate_every=2", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid",
                "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1",
                "train.learning_rate=choice(1e-12,2e-3)")
    assert statuses(tmp_path) == {"0.002": "Pruned", "1e-12": "Completed"}
    output = train_sweep(tmp_path, "train.validate_every=2", "train.learning_rate=0.002")
    assert statuses(tmp_path) == {"0.002": "Completed", "1e-12": "Completed"}
    assert "pruned after step 2" not in output and "training 3/4" in output
    assert "training 1/4" not in output


@mark.slow
def test_hyperband_prunes_and_a_continued_study_prunes_with_the_trials_before(tmp_path: Path) -> None:
    """Rungs after steps 1 and 2: a worse trial ends at a rung of its bracket."""
    words = ("train.validate_every=1", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid",
             "hydra/sweeper/pruner=hyperband", "hydra.sweeper.pruner.max_resource=4",
             "hydra.sweeper.pruner.reduction_factor=2", "hydra.sweeper.study_name=bands", "hydra.sweeper.n_jobs=1",
             "train.learning_rate=choice(1e-12,3e-3,4e-3,5e-3,6e-3)")
    train_sweep(tmp_path, *words, "hydra.sweeper.n_trials=2")
    before = statuses(tmp_path)
    assert len(before) == 2 and before["1e-12"] == "Completed"
    output = train_sweep(tmp_path, *words, "hydra.sweeper.n_trials=5")
    found = statuses(tmp_path)
    assert before.items() <= found.items() and set(found.values()) == {"Completed", "Pruned"} and len(found) == 5
    new = [status for rate, status in found.items() if rate not in before]
    assert output.count("other trials were better at this step") == new.count("Pruned")


def test_a_continued_study_has_the_budget_of_the_command_that_continues_it() -> None:
    stored = ("budget.max_hours=1", "train.seed=3")
    assert _core._with_budget([stored], ["train.seed=choice(1,3)", "budget.max_hours=2"]) == [
        ["train.seed=3", "budget.max_hours=2"]]
