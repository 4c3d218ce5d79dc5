"""GPU specifications, estimates of time and price, and the output of a plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth import plan
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.dataset import Subject
from dreambooth.config.enums import EncoderKind
from dreambooth.planner import auto_memory
from dreambooth.planner.auto_memory import larger_sample_batch
from dreambooth.planner.gpu_specs import CARDS, find_card
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.report import Plan, format_comparison, format_plan, plans_as_json, plot_step_memory
from dreambooth.planner.time_and_cost import estimate, step_seconds
from tests.support.configs import compose_config, small_recipe

# -- cards, time and price ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, card", [("Tesla T4", "T4"), ("NVIDIA A10G", "A10G"), ("NVIDIA L4", "L4"),
                                        ("NVIDIA A100-SXM4-40GB", "A100")])
def test_a_card_is_found_by_its_drivers_name(name: str, card: str) -> None:
    found = find_card(name)
    assert found is not None and found.name == card


def test_an_unknown_card_is_not_found() -> None:
    assert find_card("Voodoo 3") is None
    assert find_card(None) is None


@pytest.mark.parametrize("option", ["g4dn", "g5", "g6", "g5_12xlarge", "g6_12xlarge", "p4d"])
def test_every_configured_machine_has_a_known_card_and_a_price(option: str) -> None:
    text = (conf_dir() / "hardware" / f"{option}.yaml").read_text("utf-8")
    gpu = next(line.split()[1] for line in text.splitlines() if line.startswith("gpu:"))
    assert find_card(gpu) is not None
    assert "price_usd_hour: null" not in text.replace("spot_price_usd_hour", "spot")


def test_a_less_frequent_ema_update_makes_only_the_ema_cheaper() -> None:
    without_ema, with_ema = (small_recipe(memory__offload_optimizer=True, memory__ema_every=4, train__use_ema=ema)
                             for ema in (False, True))
    prediction, t4 = predict(without_ema), CARDS["T4"]
    at_each_step = [step_seconds(replace(recipe, memory=replace(recipe.memory, ema_every=1)), prediction, t4)
                    for recipe in (without_ema, with_ema)]
    at_each_fourth = [step_seconds(recipe, prediction, t4) for recipe in (without_ema, with_ema)]
    assert at_each_fourth[0] == at_each_step[0]
    assert at_each_fourth[1] - at_each_fourth[0] == pytest.approx((at_each_step[1] - at_each_step[0]) / 4)


def test_reducing_gradients_over_several_cards_takes_time() -> None:
    prediction, a10g = predict(small_recipe()), CARDS["A10G"]
    one, four = (step_seconds(small_recipe(hardware__gpus=count), prediction, a10g) for count in (1, 4))
    assert four - one == pytest.approx(1.5 * prediction.trained_parameters * 4 / 10e9)


def test_tf32_is_faster_than_fp32() -> None:
    prediction, a100, recipe = predict(small_recipe()), CARDS["A100"], small_recipe()
    fp32, tf32 = (step_seconds(replace(recipe, precision=replace(recipe.precision, tf32=on)), prediction, a100)
                  for on in (False, True))
    assert tf32 < fp32


def test_the_second_subject_needs_more_class_images() -> None:
    one = small_recipe(hardware__gpu="T4")
    two = replace(one, dataset=replace(one.dataset, concepts=[
        Subject("a", "a zwx toy", None, "a toy"), Subject("b", "a ohwx cup", None, "a cup")]))
    prediction = predict(one)
    seconds = [estimate(recipe, prediction, CARDS["T4"]).run_seconds or 0.0 for recipe in (one, two)]
    assert seconds[1] > seconds[0]


def test_the_base_model_generates_images_only_of_several_different_texts() -> None:
    recipe = small_recipe(hardware__gpu="T4", evaluate__encoder=EncoderKind.efficientnet_lite0)
    prediction = replace(predict(recipe), picture_flops=(10**12, 10**12))
    seconds = [estimate(replace(recipe, evaluate_texts=texts), prediction, CARDS["T4"]).run_seconds or 0.0
               for texts in ((), ("a toy",), ("a toy", "a toy"), ("a toy", "a cup"), ("a toy", "a cup", "a cup"))]
    assert seconds[0] == seconds[1] == seconds[2] < seconds[3] == seconds[4]


# -- output -------------------------------------------------------------------------------------------------------

def test_the_json_of_a_plan_has_the_documented_keys() -> None:
    plan = json.loads(plans_as_json([Plan(small_recipe(), predict(small_recipe()), (), "")]))
    assert plan.keys() >= {"fits", "card_gib", "reserved_gib", "allocated_gib", "usable_vram_gib", "by_phase",
                           "by_category", "levers", "step_seconds", "run_seconds", "price_usd"}
    assert plan["by_phase"].keys() >= {"load", "forward", "backward", "step", "ema", "save"}


def test_a_table_fits_80_columns() -> None:
    plan = Plan(small_recipe(), predict(small_recipe()), ("memory.gradient_checkpointing=true",), "an explanation")
    assert max(map(len, format_plan(plan).splitlines())) <= 80
    assert max(map(len, format_comparison([plan, plan]).splitlines())) <= 80


def test_the_plot_of_a_step_is_written(tmp_path: Path) -> None:
    plot_step_memory(Plan(small_recipe(), predict(small_recipe()), (), ""), tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("vram", [1.0, 1.5, 1.9, 2.5, 40.0])
def test_a_larger_sample_batch_is_suggested_if_a_rehearsal_of_it_fits(vram: float) -> None:
    choice = choice_with(100, vram, resolution=256)
    size = larger_sample_batch(choice)
    assert (size is None) == (vram == 1.0) and (size == 32) == (vram == 40.0)
    if size:
        prior = choice.recipe.prior
        assert prior.sample_batch_size < size and size & (size - 1) == 0
        larger = replace(choice.recipe, prior=prior.copy_with(sample_batch_size=size))
        assert auto_memory.card_gib(larger, predict(larger)) <= vram


def test_no_sample_batch_is_larger_than_the_number_of_images() -> None:
    choice = choice_with(11, 40.0)
    assert larger_sample_batch(choice) == 8


def test_no_sample_batch_is_suggested_for_a_run_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choice_with(100, 1.1, resolution=256)
    monkeypatch.setattr(auto_memory, "predict", lambda recipe: pytest.fail("it was rehearsed again"))
    assert larger_sample_batch(choice) is None


def test_a_larger_sample_batch_is_the_last_line_before_the_serving_table() -> None:
    choice = choice_with(11, 40.0)
    text = format_plan(Plan(choice.recipe, choice.prediction, (), "", larger_sample_batch=8))
    assert "prior.sample_batch_size=8 fits, too (another run, with new class images)" in text.splitlines()


@pytest.mark.parametrize("word, searched", [("plan.larger_batch=true", 1), ("plan.larger_batch=false", 0),
                                            ("plan.format=json", 0)])
def test_a_larger_sample_batch_is_searched_only_for_the_table(word: str, searched: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[auto_memory.Choice] = []
    monkeypatch.setattr(auto_memory, "larger_sample_batch", calls.append)
    monkeypatch.setattr(plan, "_plans", [])
    plan._job(load(compose_config("hardware=g4dn", "model=tiny", word)), sweep=False)
    assert len(calls) == searched


def choice_with(class_images: int, vram: float, resolution: int = 64) -> auto_memory.Choice:
    recipe = small_recipe(hardware__gpu="T4", hardware__usable_vram_gib=vram, model__resolution=resolution,
                          prior__num_class_images=class_images)
    return auto_memory.Choice(recipe, predict(recipe), (), "")
