"""Compares the planner's predictions for families of flow matching with published figures; used by planner.py.

The published figures are SimpleTuner's: documentation/experimental/SEGMENTED_CHECKPOINTING.md of bghira/SimpleTuner,
commit bc8e6ab of 2026-08-22, read 2026-11. Its runs are the examples sd3.peft-lora and z-image-turbo.peft-lora of that
commit, with validation off. Its memory is the peak of PyTorch's allocated memory, so that no constant is added here.

A row has the settings of the published run: model, resolution, batch, rank, precision, checkpointing. The settings of
SimpleTuner that a run of this project does not have apply to every row:

- adapters, their gradients and both moments of the optimizer are bf16;
- adapters are on attention's to_q, to_k, to_v and to_out.0 alone;
- T5 reads 154 tokens, and the prompt of Z-Image is padded to 32 tokens (one emoji in the chat template);
- Z-Image-Turbo has a second, frozen adapter, a file of 170 MB (zimage_turbo_training_adapter_v1.safetensors).

The last row is from documentation/quickstart/ZIMAGE.md of the same commit: the same run with validation, which
generates one picture of 1024 px without guidance at a time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

from dreambooth.config.enums import BaseWeights, Dtype, MethodKind, Targets
from dreambooth.config.recipe import Recipe
from dreambooth.models import lora
from dreambooth.models.families import FAMILIES, qwen_text, sd35
from dreambooth.models.families.flow_transformer import FlowTransformer, layer_pattern
from dreambooth.planner import rehearsal
from dreambooth.planner.fake_cuda import fake_gpu, to_dtype
from dreambooth.planner.gpu_specs import CARDS
from dreambooth.planner.prediction import STEP_PHASES, Prediction
from dreambooth.planner.time_and_cost import step_seconds
from dreambooth.training.step import TrainState
from dreambooth.utils.hardware import GIB

SHARED = {"precision__dtype": Dtype.bf16, "hardware__gpu": "L40S", "hardware__compute_capability": 8.9,
          "prior__with_prior_preservation": False, "method__kind": MethodKind.lora}
Z_IMAGE = SHARED | {"model__name": "z_image", "model__source": "Tongyi-MAI/Z-Image", "model__resolution": 512,
                    "method__rank": 64}
SD35 = SHARED | {"model__name": "sd35_medium", "model__source": "stabilityai/stable-diffusion-3.5-medium",
                 "model__resolution": 1024, "method__rank": 128, "train__train_batch_size": 3}
ASSISTANT_GIB = 170e6 / GIB  # the second adapter of Z-Image-Turbo
Z_NAME, SD_NAME = "Z-Image-Turbo, 512 px, rank 64", "SD 3.5 medium, 1024 px, batch 3, rank 128"
HALF, INT8, FP8 = BaseWeights.half, BaseWeights.int8, BaseWeights.fp8
PUBLISHED = [  # name, settings, GiB besides, base weights, checkpointing, (GiB, s per step) on an L40S, GiB on an H100
    (Z_NAME, Z_IMAGE, ASSISTANT_GIB, HALF, False, (21.21, 0.316), 21.25),
    (Z_NAME, Z_IMAGE, ASSISTANT_GIB, HALF, True, (12.83, 0.493), 12.87),
    (SD_NAME, SD35, 0.0, HALF, False, (34.53, 1.189), 34.59),
    (SD_NAME, SD35, 0.0, HALF, True, (7.62, 1.607), 7.67),
    (Z_NAME, Z_IMAGE, ASSISTANT_GIB, INT8, False, (15.55, 0.615), 15.60),
    (Z_NAME, Z_IMAGE, ASSISTANT_GIB, INT8, True, (7.20, 1.021), 7.25),
    (SD_NAME, SD35, 0.0, INT8, False, (33.61, 1.381), 33.66),
    (SD_NAME, SD35, 0.0, INT8, True, (6.53, 1.857), 6.58),
    (SD_NAME, SD35, 0.0, FP8, False, (35.17, 1.252), 35.21),
    (SD_NAME, SD35, 0.0, FP8, True, (5.65, 1.736), 5.69)]
PUBLISHED_VALIDATION = (9.66, 9.70)  # GiB on an L40S and an H100
VALIDATION = Z_IMAGE | {"model__resolution": 1024, "method__base_weights": INT8, "memory__gradient_checkpointing": True,
                        "sample__every": 50, "sample__images_per_prompt": 1, "sample__guidance_scale": 0.0,
                        "prior__sample_batch_size": 1}


class PeerRehearsal(rehearsal._Rehearsal):
    """A rehearsal whose adapters are bf16, as SimpleTuner's are."""

    def _state(self, denoiser: nn.Module) -> TrainState:
        for _, layer in lora.layers(denoiser):
            to_dtype(layer, torch.bfloat16)
        return super()._state(denoiser)


@contextmanager
def peer_settings() -> Iterator[None]:
    """Give the families of flow matching SimpleTuner's lengths of prompts and layers of adapters in a `with` block."""
    layers = dict.fromkeys(Targets, layer_pattern(r"to_[kqv]", r"to_out\.0"))
    kinds = [type(family) for family in FAMILIES if isinstance(family, FlowTransformer)]
    patches = [patch.object(kind, "adapter_targets", layers) for kind in kinds]
    patches += [patch.object(qwen_text, "PLANNED_LENGTH", 32), patch.object(sd35, "T5_LENGTH", 154)]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def predict(recipe: Recipe) -> Prediction:
    """Predict a run with SimpleTuner's settings."""
    with peer_settings(), fake_gpu(recipe.hardware.compute_capability):
        return PeerRehearsal(recipe).prediction()


def flow_table(make_recipe: Callable[..., Recipe]) -> list[str]:
    """Return a table that compares published with predicted figures for families of flow matching.

    Args:
        make_recipe: planner.make_recipe.
    """
    lines = ["| LoRA, published by SimpleTuner | L40S, GiB | H100, GiB | predicted | error, L40S | error, H100 | "
             "L40S, s per step | estimated | error | CPU s |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, settings, besides, weights, checkpointing, (memory, seconds), larger in PUBLISHED:
        start = time.process_time()
        recipe = make_recipe(**settings, method__base_weights=weights, memory__gradient_checkpointing=checkpointing)
        prediction = predict(recipe)
        needed = prediction.peak_over(*STEP_PHASES).allocated / GIB + besides
        step = step_seconds(recipe, prediction, CARDS["L40S"])
        title = f"{name}, {'' if checkpointing else 'no '}checkpointing" + f", {weights.value}" * (weights is not HALF)
        lines.append(f"| {title} | {memory:.2f} | {larger:.2f} | "
                     f"{needed:.2f} | {needed / memory - 1:+.1%} | {needed / larger - 1:+.1%} | {seconds:.2f} | "
                     f"{step:.2f} | {step / seconds - 1:+.0%} | {time.process_time() - start:.1f} |")
        print(lines[-1], flush=True)
    start = time.process_time()
    recipe = make_recipe(**VALIDATION)
    needed = predict(recipe).by_phase["sample"].allocated / GIB + ASSISTANT_GIB
    memory, larger = PUBLISHED_VALIDATION
    lines.append(f"| {Z_NAME}, checkpointing, int8, with validation at 1024 px | {memory:.2f} | {larger:.2f} | "
                 f"{needed:.2f} | {needed / memory - 1:+.1%} | {needed / larger - 1:+.1%} | - | - | - | "
                 f"{time.process_time() - start:.1f} |")
    print(lines[-1], flush=True)
    return lines
