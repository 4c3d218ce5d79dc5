"""What the planner says of full-size runs on a T4: predicted card GiB, never measured. Rehearsals take seconds each."""

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
        found = load(compose("config", ["experiment=blog_g4dn", "dataset.instance_dir=photos", *overrides]))
    return resolve(found, Path("runs/plan"))


@pytest.mark.parametrize("limit", ["1.0", "null"])
def test_the_blogs_run_fits_a_t4_with_nothing_trained_differently(limit: str) -> None:
    asked = blog(f"train.max_grad_norm={limit}")
    choice = auto_memory.choose_memory_options(asked)
    assert auto_memory.card_gib(choice.recipe, choice.prediction) <= 0.95 * 14.6
    assert replace(choice.recipe, memory=asked.memory) == asked


@pytest.mark.parametrize("limit", [1.0, None])
@pytest.mark.parametrize(("aim", "name", "changed"), [pytest.param(*row, id=row[1]) for row in planner.BUDGETS])
def test_everything_trained_fits_its_budget(
    aim: float, name: str, changed: dict[str, Any], limit: float | None
) -> None:
    asked = planner.make_recipe(**(planner.LOWEST_MEMORY | changed | {
        "train__train_text_encoder": True, "train__use_ema": True, "train__max_grad_norm": limit}))
    assert planner.predict_step(asked)[0] + CARDS["T4"].cuda_overhead_gib <= aim


def test_the_blogs_run_would_not_fit_as_the_blog_ran_it() -> None:
    as_it_was = blog("memory=fast", "memory.gradient_checkpointing=true", "memory.cache_latents=false")
    choice = auto_memory.choose_memory_options(as_it_was)
    assert auto_memory.card_gib(choice.recipe, choice.prediction) > 14.6
