"""Predictions for full-size runs on a T4: GiB of the card, not measured. Each rehearsal takes seconds."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.planner import auto_memory
from dreambooth.planner.gpu_specs import CARDS
from dreambooth.planner.prediction import STEP_PHASES
from dreambooth.utils.hardware import GIB

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import planner
import planner_flow

pytestmark = pytest.mark.slow


def blog(*overrides: str) -> Recipe:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(compose("config", ["experiment=blog_g4dn", "dataset.instance_dir=photos", *overrides]))
    return resolve(config, Path("runs/plan"))


@pytest.mark.parametrize("limit", ["1.0", "null"])
def test_the_blogs_run_fits_a_t4_without_a_change_of_what_is_trained(limit: str) -> None:
    recipe = blog(f"train.max_grad_norm={limit}")
    choice = auto_memory.choose_memory_options(recipe)
    assert auto_memory.card_gib(choice.recipe, choice.prediction) <= 0.95 * 14.6
    assert replace(choice.recipe, memory=recipe.memory) == recipe


@pytest.mark.parametrize("limit", [1.0, None])
@pytest.mark.parametrize(("aim", "name", "changed"), [pytest.param(*row, id=row[1]) for row in planner.BUDGETS])
def test_a_run_that_trains_everything_fits_its_budget(
    aim: float, name: str, changed: dict[str, Any], limit: float | None
) -> None:
    recipe = planner.make_recipe(**(planner.LOWEST_MEMORY | changed | {
        "train__train_text_encoder": True, "train__use_ema": True, "train__max_grad_norm": limit}))
    assert planner.predict_step(recipe)[0] + CARDS["T4"].cuda_overhead_gib <= aim


def test_the_blogs_run_does_not_fit_with_the_blogs_own_settings() -> None:
    recipe = blog("memory=fast", "memory.gradient_checkpointing=true", "memory.cache_latents=false")
    choice = auto_memory.choose_memory_options(recipe)
    assert auto_memory.card_gib(choice.recipe, choice.prediction) > 14.6


def test_eight_published_peaks_of_flow_matching_are_predicted_within_ten_percent() -> None:
    """The other runs are of SD 3.5 with quantised weights, which SimpleTuner stores in another way: docs/planner.md."""
    errors = {}
    for name, settings, besides, weights, checkpointing, (published, _), _ in planner_flow.PUBLISHED:
        if name == planner_flow.SD_NAME and weights is not planner_flow.HALF and not (
                weights is planner_flow.FP8 and checkpointing):
            continue
        prediction = planner_flow.predict(planner.make_recipe(
            **settings, method__base_weights=weights, memory__gradient_checkpointing=checkpointing))
        needed = prediction.peak_over(*STEP_PHASES).allocated / GIB + besides
        errors[name, weights, checkpointing] = needed / published - 1
    validation = planner_flow.predict(planner.make_recipe(**planner_flow.VALIDATION)).by_phase["sample"].allocated / GIB
    errors["validation"] = (validation + planner_flow.ASSISTANT_GIB) / planner_flow.PUBLISHED_VALIDATION[0] - 1
    assert len(errors) == 8
    assert all(abs(error) <= 0.1 for error in errors.values()), errors


def test_a_lora_of_flux2_klein_fits_a_t4_with_checkpointing_alone() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = load(compose("config", ["model=flux2_klein", "method=lora", "hardware=g4dn",
                                         "dataset.instance_dir=photos", "dataset.instance_prompt=a zwx dog",
                                         "dataset.class_prompt=a dog"]))
    choice = auto_memory.choose_memory_options(resolve(config, Path("runs/plan")))
    assert choice.added == ("memory.gradient_checkpointing=true",)
    assert auto_memory.card_gib(choice.recipe, choice.prediction) <= 0.95 * 14.6
