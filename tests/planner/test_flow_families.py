"""The planner's predictions for families whose text encoders leave before the denoiser is loaded."""

from pathlib import Path

import pytest

from dreambooth.config.enums import MethodKind
from dreambooth.config.recipe import Recipe
from dreambooth.planner.fake_cuda import fake_tensors
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.skeleton_models import build_skeleton
from dreambooth.planner.time_and_cost import PROCESS_GIB, host_gib
from dreambooth.utils.hardware import GIB
from tests.support import tiny_models
from tests.support.configs import small_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_flow("z_image", tmp_path_factory.mktemp("model"))


def _recipe(model: Path, **changed: object) -> Recipe:
    return small_recipe(**{"model__source": str(model), "model__resolution": 64, "method__kind": MethodKind.lora,
                           **changed})


def test_text_encoders_are_on_the_card_only_while_they_encode_prompts(model: Path) -> None:
    ahead, together = predict(_recipe(model)), predict(_recipe(model, memory__cache_text=False))
    with fake_tensors():
        parts = build_skeleton(_recipe(model))
    encoders = sum(p.nbytes for encoder in parts.encoders for p in encoder.parameters())
    weights = {phase: usage.by_category["weights"] for phase, usage in ahead.by_phase.items()}
    assert "prompts" not in together.by_phase
    assert encoders <= weights["prompts"] < 1.01 * encoders + 4096
    assert weights["load"] == together.by_phase["load"].by_category["weights"] - weights["prompts"]
    assert max(weights.values()) < weights["load"] + 4 * (ahead.trained_parameters + 1)
    assert ahead.encoder_parameters == encoders / 4
    assert ahead.frozen_parameters + ahead.encoder_parameters == together.frozen_parameters


def test_host_memory_is_needed_for_the_text_encoders_or_for_the_denoiser(model: Path) -> None:
    recipe = _recipe(model)
    prediction = predict(recipe)
    run = prediction.host_bytes + 4 * (prediction.trained_parameters + prediction.frozen_parameters)
    assert host_gib(recipe, prediction) == PROCESS_GIB + max(run, 4 * prediction.encoder_parameters) / GIB
