"""memory=auto: which options it chooses, which options a plan lists, and how a run uses the choice."""

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dreambooth import run
from dreambooth.config.enums import Dtype, MethodKind, OptimizerKind, TrackingKind
from dreambooth.config.hardware import presets
from dreambooth.config.recipe import Recipe
from dreambooth.planner import auto_memory, memory_options, time_and_cost
from dreambooth.planner.auto_memory import choose_memory_options
from dreambooth.planner.gpu_specs import find_card
from dreambooth.planner.memory_options import describe_memory_options, list_memory_options
from dreambooth.planner.prediction import Prediction
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.time_and_cost import pictures_of_one_process
from dreambooth.runs.run_folder import Result
from dreambooth.runtime.engine import Engine, create_engine
from dreambooth.training.setup import assemble
from dreambooth.utils.signals import StopRequest
from tests.support.configs import demo_recipe, small_recipe

LARGE_CARD = {"memory__auto": True, "hardware__usable_vram_gib": 80.0}  # the lower bound rules out no candidate


TWO_RATES: dict[str, Any] = {"train__train_text_encoder": True, "train__text_encoder_learning_rate": 1e-6}


@cache
def predict_small_run() -> Prediction:
    return predict(small_recipe())


class FakeRehearsal:
    """Predicts that a run needs `needed(recipe)` GiB, and records the recipes that it is called with."""

    def __init__(self, needed: Callable[[Recipe], float]) -> None:
        self.needed = needed
        self.recipes: list[Recipe] = []

    def __call__(self, recipe: Recipe) -> Any:
        self.recipes.append(recipe)
        base = predict_small_run()
        size = int(self.needed(recipe) * 2**30)
        return type("FakePrediction", (), {"reserved": size, "trained_parameters": base.trained_parameters,
                                           "by_phase": base.by_phase, "peak_over": base.peak_over,
                                           "peak_phase": "backward", "block_bytes": ()})()


# -- choosing options ---------------------------------------------------------------------------------------------

def test_auto_adds_nothing_if_everything_fits() -> None:
    choice = choose_memory_options(demo_recipe("sd15", **LARGE_CARD), FakeRehearsal(lambda r: 10.0))
    assert choice.added == ()


def test_auto_takes_the_first_candidate_that_fits_95_percent_of_the_card() -> None:
    rehearsal = FakeRehearsal(lambda r: 75.0 if r.memory.gradient_checkpointing else 75.5)  # 0.74 more, of 76
    choice = choose_memory_options(demo_recipe("sd15", **LARGE_CARD), rehearsal)
    assert choice.added == ("memory.gradient_checkpointing=true",)


def test_auto_changes_no_option_that_affects_results() -> None:
    rehearsal = FakeRehearsal(lambda r: 80.0)
    recipe = demo_recipe("sd15", prior__sample_batch_size=1, **LARGE_CARD)
    choose_memory_options(recipe, rehearsal)
    assert len(rehearsal.recipes) > 3
    for candidate in rehearsal.recipes:
        assert replace(candidate, memory=recipe.memory) == recipe
        for key in ("weights", "rounding", "ema_every", "split_prior", "offload_optimizer"):
            assert getattr(candidate.memory, key) == getattr(recipe.memory, key), key


def test_candidates_that_cannot_fit_are_not_rehearsed() -> None:
    rehearsal = FakeRehearsal(lambda r: 12.0)
    choose_memory_options(demo_recipe("sd15", memory__auto=True), rehearsal)
    assert rehearsal.recipes[0].memory.gradient_checkpointing, "20 bytes per weight are more than a T4 has"


@pytest.mark.parametrize(("method", "needed", "count"), [(MethodKind.full, 99.0, 3), (MethodKind.lora, 77.0, 2)])
def test_options_for_trained_weights_are_not_rehearsed_if_they_cannot_save_enough(
        method: MethodKind, needed: float, count: int) -> None:
    rehearsal = FakeRehearsal(lambda r: needed)
    choose_memory_options(demo_recipe("sd15", method__kind=method, prior__sample_batch_size=1, **LARGE_CARD), rehearsal)
    assert len(rehearsal.recipes) == count


def test_images_are_generated_one_at_a_time_if_only_sampling_does_not_fit() -> None:
    rehearsal = FakeRehearsal(lambda r: 79.0 if r.prior.sample_batch_size > 1 else 70.0)
    choice = choose_memory_options(demo_recipe("sd15", **LARGE_CARD), rehearsal)
    assert choice.added == ("prior.sample_batch_size=1",)


def test_auto_keeps_options_that_the_user_switched_on() -> None:
    recipe = demo_recipe("sd15", memory__gradient_checkpointing=True, **LARGE_CARD)
    choice = choose_memory_options(recipe, FakeRehearsal(lambda r: 1.0))
    assert choice.recipe.memory.gradient_checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("changed, processes", [
    ({"train__gradient_accumulation_steps": 2}, None), ({"train__compile": True}, None), ({}, 2),
    ({"hardware__gpus": 4}, None)], ids=["accumulation", "compiled", "two processes", "four cards"])
def test_auto_does_not_step_in_the_backward_pass_where_that_is_impossible(
        changed: dict[str, object], processes: int | None) -> None:
    rehearsal = FakeRehearsal(lambda r: 99.0)
    choose_memory_options(demo_recipe("sd15", **changed, **LARGE_CARD), rehearsal, processes=processes)
    assert not any(candidate.memory.optimizer_in_backward for candidate in rehearsal.recipes)


@pytest.mark.slow
def test_listed_options_are_for_the_phase_that_needs_the_most_memory() -> None:
    """Options that do not change the results come first. They are about sampling if that needs the most."""
    recipe = demo_recipe("sd15", memory__auto=False, prior__num_class_images=1, sample__every=None)
    prediction = predict(recipe)
    options = list_memory_options(recipe, prediction)
    assert [option.exact for option in options] == sorted((option.exact for option in options), reverse=True)
    cost = {option.overrides: option.extra_seconds or 0.0 for option in options}
    assert cost["memory.gradient_checkpointing=true"] > 0.1 and cost["memory.ema_device=cpu"] > 0.1
    description = describe_memory_options(recipe, prediction)
    assert description.startswith("memory=auto") and description.endswith("hardware=g5")
    sampling = demo_recipe("sd15", prior__sample_batch_size=32, sample__images_per_prompt=1,
                           memory__gradient_checkpointing=True)
    assert list_memory_options(sampling, predict(sampling))[0].overrides == "prior.sample_batch_size=1"


@pytest.mark.parametrize("vram, larger", [(14.6, "a larger card, such as hardware=g5"), (22.0, "hardware=g6e"),
                                          (39.2, "hardware=g6e"), (80.0, "a larger card")])
def test_a_larger_card_is_larger(vram: float, larger: str) -> None:
    recipe = demo_recipe("sd15", hardware__usable_vram_gib=vram)
    assert describe_memory_options(recipe, predict_small_run()).endswith(larger)


def test_the_larger_cards_are_those_of_their_presets() -> None:
    machines = presets()
    assert [machines[name].usable_vram_gib for name in ("g5", "g6e")] == [22.0, 44.0]


@pytest.mark.parametrize("changed, key, advised", [
    ({"optimizer__kind": OptimizerKind.muon}, "method=", ["method=lora optimizer=adamw"]),
    ({"train__channels_last": True}, "memory.weights=", []),
    (TWO_RATES, "memory.weights=", []),
    (TWO_RATES, "train.train_text_encoder=",
     ["train.train_text_encoder=false train.text_encoder_learning_rate=null"]),
    ({"train__global_batch_size": 4, "train__train_batch_size": 4, "memory__optimizer_in_backward": True},
     "train.train_batch_size=", ["train.train_batch_size=1 memory.optimizer_in_backward=false"]),
    ({}, "memory.weights=", ["memory.weights=half memory.rounding=stochastic"])])
def test_advice_of_a_plan_is_accepted_when_it_is_typed(changed: dict[str, Any], key: str, advised: list[str]) -> None:
    recipe, prediction = demo_recipe("sd15", **changed), replace(predict_small_run(), trained_parameters=10**9)
    options = [*memory_options._exact_options(recipe, prediction), *memory_options._inexact_options(recipe, prediction)]
    assert [option.overrides for option in options if option.overrides.startswith(key)] == advised


@pytest.mark.parametrize("pictures, batch, gpus, expected", [
    (10, 4, 1, 10), (10, 4, 2, 8), (10, 4, 8, 4), (0, 4, 8, 0), (3, 4, 8, 3), (33, 4, 4, 12)])
def test_processes_generate_batches_in_turn(pictures: int, batch: int, gpus: int, expected: int) -> None:
    assert pictures_of_one_process(demo_recipe("sd15", hardware__gpus=gpus), pictures, batch) == expected


def test_the_estimate_divides_samples_and_evaluation_among_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def none(recipe: Recipe, pictures: int, batch: int) -> int:
        asked.append((pictures, batch))
        return 0

    recipe = demo_recipe("sd15", sample__images_per_prompt=3, prior__sample_batch_size=2)
    prediction, card = replace(predict_small_run(), picture_flops=(10**12, 10**12)), find_card("T4")
    before = time_and_cost.estimate(recipe, prediction, card).run_seconds
    monkeypatch.setattr(time_and_cost, "pictures_of_one_process", none)
    after = time_and_cost.estimate(recipe, prediction, card).run_seconds
    assert before is not None and after is not None and after < before
    assert asked[0] == (3 * len(recipe.sample_prompts), 3) and {batch for _, batch in asked[1:]} == {2}
    assert asked[1][0] == len(recipe.evaluate_prompts) * recipe.evaluate.images_per_prompt


# -- in a run -----------------------------------------------------------------------------------------------------

def test_a_finished_run_is_not_planned_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = Result(8, 0.5, 1.0, str(tmp_path), "model")
    monkeypatch.setattr(run, "load_finished", lambda recipe: result)
    monkeypatch.setattr(run, "track_run", lambda *_: nullcontext())
    monkeypatch.setattr(auto_memory, "apply_auto_memory", lambda *_: pytest.fail("it was planned"))
    recipe = demo_recipe(memory__auto=True, tracking__kind=TrackingKind.none)
    assert run.execute(replace(recipe, run_dir=tmp_path), StopRequest()) is result


def test_a_run_on_the_cpu_has_nothing_to_choose() -> None:
    recipe = small_recipe(memory__auto=True)
    assert auto_memory.apply_auto_memory(recipe) == (recipe, {}, "")


def test_a_chosen_recipe_can_be_sent_to_other_processes() -> None:
    recipe = demo_recipe("sd15")
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # the engine sends it from the main process


def test_the_autocast_cache_can_be_set_after_the_engine_is_created() -> None:
    AcceleratorState._reset_state()  # a process has one precision
    engine, _ = create_engine("cpu", Dtype.bf16)
    states = []
    for enabled in (True, False):
        engine.set_autocast_cache(enabled)
        with engine.autocast():
            states.append(torch.is_autocast_cache_enabled())
    AcceleratorState._reset_state()
    assert states == [True, False]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_sets_the_autocast_cache_of_the_engine(enabled: bool) -> None:
    class CacheSet(Exception):
        pass

    def set_autocast_cache(value: bool) -> None:
        raise CacheSet(value)

    unused: Any = None
    engine = Engine(set_autocast_cache=set_autocast_cache)
    with pytest.raises(CacheSet, match=str(enabled)):
        assemble(small_recipe(memory__autocast_cache=enabled), engine, *[unused] * 3)
