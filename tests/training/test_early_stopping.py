"""Early stopping: the rules of patience and bound, and the steps that count."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreambooth.config.enums import Direction
from dreambooth.config.schema import StopWhen
from dreambooth.errors import UserError
from dreambooth.runs import pruning
from dreambooth.runtime.engine import Engine
from dreambooth.training import checkpoint
from dreambooth.training.early_stopping import EarlyStopping, PruningHook, reason_to_stop
from dreambooth.training.step import History, Objective, train_step
from tests.support.toy_model import ToyModel, make_batches, make_schedule, make_state

MIN, MAX = Direction.min, Direction.max
ROLES = {"validation_loss": "validation_loss", "dino": "subject_similarity", "class_drift_dino": "class_drift"}


@pytest.mark.parametrize("rule, mode, values, stops", [
    ({"patience": 2}, MIN, [3, 2, 2, 2], True),
    ({"patience": 2}, MIN, [3, 2, 2], False),
    ({"patience": 2}, MIN, [3, 2, 2.5, 1.9, 2], False),  # an improvement starts the count again
    ({"patience": 2}, MAX, [3, 2, 2.5], True),
    ({"patience": 2, "min_delta": 0.5}, MIN, [3, 2.7, 2.6], True),  # of less than min_delta
    ({"patience": 2, "min_delta": 0.5}, MIN, [3, 2.4, 2.3], False),
    ({"patience": 1}, MIN, [float("nan")], True),
    ({"patience": None, "bound": 2.0}, MIN, [3, 2.1], False),
    ({"patience": None, "bound": 2.0}, MIN, [3, 2.0], True),
    ({"patience": None, "bound": 2.0}, MAX, [1, 2.5], True),
    ({"patience": None, "bound": 2.0}, MAX, [2.5, 1], False),  # the last value decides
    ({"patience": 3}, MIN, [], False)])
def test_patience_and_bound(rule: dict[str, Any], mode: Direction, values: list[float], stops: bool) -> None:
    by_step = {10 * i: value for i, value in enumerate(values, start=1)}
    assert (reason_to_stop(StopWhen(measure="x", **rule), mode, by_step) is not None) is stops


def stopping(measure: str | None, scores: dict[int, dict[str, float]], **rule: Any) -> tuple[EarlyStopping, list[str]]:
    done: list[str] = []
    recipe = SimpleNamespace(measure_roles=ROLES, sample=SimpleNamespace(every=5), train=SimpleNamespace(
        stop_when=StopWhen(measure=measure, **rule), max_train_steps=100))
    setup = SimpleNamespace(state=SimpleNamespace(history=History(scores), step=max(scores)))
    saving, sampling = SimpleNamespace(takes_part=True, save=lambda: done.append("saved")), SimpleNamespace(
        sample=lambda step: done.append(f"sampled {step}"))
    validation = SimpleNamespace(measure_once=lambda step: done.append(f"validated {step}"))
    evaluation = SimpleNamespace(evaluate=lambda step: done.append(f"evaluated {step}"), validation=validation)
    hook = EarlyStopping(setup, Engine(), recipe, saving, sampling, evaluation)  # type: ignore[arg-type]
    return hook, done


def test_the_step_after_which_a_run_stops_is_saved_sampled_and_evaluated_like_a_last_step() -> None:
    hook, done = stopping("validation_loss", {step: {"validation_loss": value} for step, value in (
        (0, 0.1), (10, 0.3), (20, 0.2), (30, 0.25))}, patience=1)
    hook(SimpleNamespace(step=20))  # type: ignore[arg-type]
    assert not hook.reached() and not done, "the base model counts, or a later step"
    hook.before_training()
    assert done == ["saved", "sampled 30", "evaluated 30", "validated 30"]
    assert hook.reason == "validation_loss has not improved in 1 measurement: the best was 0.2 at step 20"


@pytest.mark.parametrize("measure, scores, stops", [
    (None, {"dino": 0.1}, False),
    ("subject_similarity", {"dino": 0.1}, True),
    ("class_drift", {"class_drift_dino": 0.1}, False),  # lower is better
    ("dino+0.5*class_drift", {"dino": 0.1, "class_drift_dino": 0.1}, True),
    ("dino+0.5*class_drift", {"class_drift_dino": 0.9}, False)])  # a term was not measured: the step does not count
def test_the_measure_is_a_name_or_a_sum(measure: str | None, scores: dict[str, float], stops: bool) -> None:
    hook, _ = stopping(measure, {10: {"dino": 0.5, "class_drift_dino": 0.2}, 20: scores}, patience=1)
    hook.check(20)
    assert hook.reached() is stops


def test_the_last_step_of_a_run_is_no_decision() -> None:
    hook, done = stopping("validation_loss", {100: {"validation_loss": 1.0}}, bound=2.0)
    hook.check(100)
    assert not hook.reached() and not done


def test_a_checkpoint_contains_the_values_that_decide(tmp_path: Path) -> None:
    """A machine that has nothing but a checkpoint of the run decides like the one that measured."""
    model, scaler = ToyModel(), torch.amp.GradScaler("cpu", enabled=False)
    state = make_state(model)
    train_step(state, make_batches()(0), Objective(make_schedule()), Engine(), 1.0)
    without = checkpoint.save(tmp_path / "a", state, model, scaler, 1)
    assert "history" not in json.loads((without / "state.json").read_text())
    state.history = History({0: {"validation_loss": 0.1 + 0.2}, 10: {"dino": 1 / 3}}, 2.5, 3)
    saved = checkpoint.save(tmp_path / "b", state, model, scaler, 1)
    resumed = make_state(model)
    checkpoint.restore(saved, resumed, model, scaler)
    assert resumed.history == state.history


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_a_search_prunes_is_saved(ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reported value is lower if the run is better; the last step is not reported."""
    reported: list[tuple[int, float]] = []
    saved: list[bool] = []

    class Reporter:
        measure = "subject_similarity_dino"

        def report(self, step: int, value: float) -> bool:
            reported.append((step, value))
            return ends

    monkeypatch.setattr(pruning, "_active", pruning._Active(Reporter()))
    recipe = SimpleNamespace(run_dir=tmp_path, measure_roles={"subject_similarity_dino": "subject_similarity"},
                             train=SimpleNamespace(max_train_steps=8, validate_every=None),
                             evaluate=SimpleNamespace(every=2, objective="instance_loss"))
    evaluation = SimpleNamespace(scores=lambda step: {"subject_similarity_dino": 0.5} if step % 2 == 0 else {})
    hook: Any = PruningHook(None, recipe, SimpleNamespace(save=lambda: saved.append(True)), evaluation,  # type: ignore[arg-type]
                            SimpleNamespace(reached=lambda: False))  # type: ignore[arg-type]
    hook.check(1)
    if ends:
        with pytest.raises(pruning.Pruned, match="pruned after step 2"):
            hook.check(2)
        assert (tmp_path / pruning.PRUNED_FILE).is_file()
    else:
        hook.check(2)
    hook.check(8)
    assert (reported, saved) == ([(2, -0.5)], [True] * ends)
    recipe.evaluate.every = None
    with pytest.raises(UserError, match=r"type evaluate\.every=50"):
        PruningHook(None, recipe, None, evaluation, None)  # type: ignore[arg-type]
