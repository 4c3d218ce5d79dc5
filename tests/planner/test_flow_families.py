"""The planner's predictions for families whose text encoders leave before the denoiser is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from dreambooth.config.enums import BaseWeights, Device, Dtype, MethodKind
from dreambooth.config.recipe import Recipe
from dreambooth.models.block_swap import SLOTS
from dreambooth.planner.auto_memory import choose_memory_options
from dreambooth.planner.fake_cuda import fake_tensors
from dreambooth.planner.gpu_specs import CARDS
from dreambooth.planner.memory_options import CHECKPOINTED_SHARE, RECOMPUTED_FORWARD, list_memory_options
from dreambooth.planner.prediction import STEP_PHASES, Prediction
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.skeleton_models import build_skeleton, count_trained_weights
from dreambooth.planner.time_and_cost import (
    BANDWIDTH_SHARE,
    DEQUANTISED,
    EFFICIENCY,
    HOST_LINK,
    PROCESS_GIB,
    disk_gib,
    host_gib,
)
from dreambooth.planner.trace_replay import Usage
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
    assert ahead.encoder_bytes == encoders
    assert ahead.frozen_parameters + ahead.encoder_bytes / 4 == together.frozen_parameters


def test_host_memory_is_needed_for_the_text_encoders_or_for_the_denoiser(model: Path) -> None:
    recipe = _recipe(model)
    prediction = predict(recipe)
    run = prediction.host_bytes + 4 * (prediction.trained_parameters + prediction.frozen_parameters)
    for encoders in (run - 1, run + 1):
        changed = replace(prediction, encoder_bytes=encoders)
        assert host_gib(recipe, changed) == PROCESS_GIB + max(run, encoders) / GIB


def test_swapped_blocks_are_in_host_memory_except_two(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, deeper := tmp_path / "model")
    config = deeper / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_layers": 5}))
    checkpointed = {"memory__gradient_checkpointing": True}
    plain, swapped = predict(_recipe(deeper, **checkpointed)), predict(
        _recipe(deeper, **checkpointed, memory__swap_blocks=3))
    block = max(swapped.block_bytes)
    peaks = [prediction.peak_over(*STEP_PHASES).by_category["weights"] for prediction in (plain, swapped)]
    assert len(swapped.block_bytes) == 5
    assert swapped.host_bytes - plain.host_bytes >= 3 * block
    assert abs(peaks[0] - peaks[1] - block) < 8192  # the slots have aligned tensors
    assert swapped.copied_bytes[0] >= 2 * (3 - SLOTS) * block and plain.copied_bytes == (0, 0)
    assert swapped.step_flops == plain.step_flops


@pytest.mark.parametrize("kind, size", [(BaseWeights.int8, 1), (BaseWeights.fp8, 1)])
def test_quantised_weights_have_their_number_of_bytes(model: Path, kind: BaseWeights, size: int) -> None:
    changed = {"precision__dtype": Dtype.bf16, "hardware__compute_capability": 8.9}
    half, quantised = (predict(_recipe(model, **changed, method__base_weights=weights))
                       for weights in (BaseWeights.half, kind))
    with fake_tensors():
        linear = [layer for layer in build_skeleton(_recipe(model)).denoiser.modules() if type(layer) is nn.Linear]
    saved = sum((2 - size) * layer.weight.numel() - 2 * layer.out_features for layer in linear)
    weights = [prediction.by_phase["load"].by_category["weights"] for prediction in (half, quantised)]
    assert weights[0] - weights[1] == saved
    assert quantised.step_flops == half.step_flops
    assert count_trained_weights(_recipe(model, **changed, method__base_weights=kind)) == count_trained_weights(
        _recipe(model))


def test_packed_weights_of_4_bits_are_counted_as_weights(model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    card = {"hardware__device": Device.cuda, "hardware__gpu": "L4", "hardware__compute_capability": 8.9,
            "precision__dtype": Dtype.bf16}
    half, packed = (predict(_recipe(model, **card, method__base_weights=weights)).frozen_parameters
                    for weights in (BaseWeights.half, BaseWeights.nf4))
    assert packed == half


def test_a_text_encoder_of_an_fp32_run_keeps_the_precision_of_its_files(model: Path, tmp_path: Path) -> None:
    """A layer is converted to fp32 when it computes: the layers never need fp32 together."""
    half = shutil.copytree(model, tmp_path / "half")
    path = half / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    with fake_tensors():
        plain, stored = (build_skeleton(_recipe(folder)).encoders[0] for folder in (model, half))
    for name, weight in stored.named_parameters():
        expected = plain.get_parameter(name).nbytes // (2 if name.startswith("layers.") else 1)
        assert weight.nbytes == expected, name
    halved = sum(weight.nbytes for name, weight in stored.named_parameters() if name.startswith("layers."))
    recipes = [_recipe(folder) for folder in (model, half)]
    predictions = [predict(recipe) for recipe in recipes]
    disks = [disk_gib(recipe, prediction) for recipe, prediction in zip(recipes, predictions, strict=True)]
    hosts = [host_gib(recipe, replace(prediction, frozen_parameters=0))  # the encoders need more than the denoiser
             for recipe, prediction in zip(recipes, predictions, strict=True)]
    assert disks[0] - disks[1] == pytest.approx(halved / GIB)
    assert hosts[0] - hosts[1] == pytest.approx(halved / GIB)


class CardOf:
    """A rehearsal of a real recipe: its denoiser needs `gib` GiB on the card, and each swapped block saves 0.5 GiB."""

    def __init__(self, gib: float, block_gib: float = 0.5) -> None:
        self.gib, self.block_gib = gib, block_gib
        self.recipes: list[Recipe] = []

    def __call__(self, recipe: Recipe) -> Any:
        self.recipes.append(recipe)
        saved = self.block_gib * max(0, (recipe.memory.swap_blocks or 0) - SLOTS)
        usage = Usage(0, int((self.gib - saved) * GIB), {"activations": 0})
        return SimpleNamespace(reserved=usage.reserved, trained_parameters=10**6, peak_phase="backward",
                               block_bytes=(int(0.5 * GIB),) * 20, by_phase={"prompts": Usage()},
                               peak_over=lambda *_: usage)


@pytest.mark.parametrize("gib, block_gib, chosen", [(12.0, 0.5, None), (15.1, 0.5, 6), (15.1, 0.4, 7), (99.0, 0.5, 20)])
def test_auto_swaps_as_many_blocks_as_are_needed(
        model: Path, gib: float, block_gib: float, chosen: int | None) -> None:
    card = {"hardware__device": Device.cuda, "hardware__gpu": "T4", "hardware__compute_capability": 7.5,
            "hardware__usable_vram_gib": 14.6, "precision__dtype": Dtype.fp32, "memory__auto": True}
    rehearse = CardOf(gib, block_gib)
    choice = choose_memory_options(_recipe(model, **card), rehearse)
    assert choice.recipe.memory.swap_blocks == chosen
    assert choice.recipe.memory.gradient_checkpointing is (chosen is not None)
    assert len(rehearse.recipes) <= 4


def _prediction_of_20_blocks(**changed: object) -> Prediction:
    """A step that computes for 1 s on an L4 and needs 8 GiB for activations, of a model with 20 blocks of 0.5 GiB."""
    flops = {"forward": int(121e12 * EFFICIENCY[True])}
    values: dict[str, Any] = {"block_bytes": (GIB // 2,) * 20, "trace": SimpleNamespace(flops=flops), **changed}
    prediction = Prediction(**{"trained_parameters": 0, "frozen_parameters": 10**10, "encoder_bytes": 0,
                               "picture_flops": (0, 0), "encode_flops": 0, **values})
    prediction.__dict__["by_phase"] = {"backward": Usage(1, 1, {"activations": 8 * GIB})}
    return prediction


def test_a_plan_states_what_swapped_blocks_save_and_cost() -> None:
    """If the option also switches checkpointing on, activations are saved and the forward pass is computed twice."""
    recipe = _recipe(Path("model"), hardware__device=Device.cuda, hardware__gpu="L4", hardware__compute_capability=8.9,
                     precision__dtype=Dtype.bf16)
    copy = GIB // 2 / HOST_LINK  # seconds for one block
    options = {option.overrides: option for option in list_memory_options(recipe, _prediction_of_20_blocks())}
    both = options["memory.swap_blocks=20 memory.gradient_checkpointing=true"]
    assert both.saved_gib == 18 * 0.5 + 8 * (1 - CHECKPOINTED_SHARE)
    assert both.extra_seconds == pytest.approx(max(RECOMPUTED_FORWARD, 36 * copy) - 1)
    assert options["method.base_weights=int8"].saved_gib == 5

    half = replace(recipe, memory=recipe.memory.copy_with(swap_blocks=10, gradient_checkpointing=True))
    prediction = _prediction_of_20_blocks(copied_bytes=(16 * GIB // 2, 0))
    options = {option.overrides: option for option in list_memory_options(half, prediction)}
    assert options["memory.swap_blocks=20"].saved_gib == (12 - 2) * 0.5
    assert options["memory.swap_blocks=20"].extra_seconds == pytest.approx(36 * copy - 1)
    assert options["method.base_weights=int8"].saved_gib == 12 * 0.5 / 2
    dequantise = 10**10 * 3 * DEQUANTISED[BaseWeights.int8] / (CARDS["L4"].bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
    assert options["method.base_weights=int8"].extra_seconds == pytest.approx(dequantise)


def test_recomputing_a_quantised_forward_pass_dequantises_again() -> None:
    recipe = _recipe(Path("model"), hardware__device=Device.cuda, hardware__gpu="L4", hardware__compute_capability=8.9,
                     precision__dtype=Dtype.bf16, method__base_weights=BaseWeights.int8)
    options = {option.overrides: option for option in list_memory_options(recipe, _prediction_of_20_blocks())}
    dequantise = 10**10 * DEQUANTISED[BaseWeights.int8] / (CARDS["L4"].bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
    assert options["memory.gradient_checkpointing=true"].extra_seconds == pytest.approx(
        RECOMPUTED_FORWARD - 1 + dequantise)
