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

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import planner

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
