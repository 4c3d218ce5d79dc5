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
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

from dreambooth.config.enums import Dtype, MethodKind, Targets
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
PUBLISHED = [  # name, settings, checkpointing, (GiB, s per step) on an L40S and an H100, GiB that the run has besides
    ("Z-Image-Turbo, 512 px, rank 64", Z_IMAGE, False, (21.21, 0.316), (21.25, 0.243), ASSISTANT_GIB),
    ("Z-Image-Turbo, 512 px, rank 64", Z_IMAGE, True, (12.83, 0.493), (12.87, 0.479), ASSISTANT_GIB),
    ("SD 3.5 medium, 1024 px, batch 3, rank 128", SD35, False, (34.53, 1.189), (34.59, 0.529), 0.0),
    ("SD 3.5 medium, 1024 px, batch 3, rank 128", SD35, True, (7.62, 1.607), (7.67, 0.721), 0.0)]


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
    for name, settings, checkpointing, (memory, seconds), (larger, _), besides in PUBLISHED:
        start = time.process_time()
        recipe = make_recipe(**settings, memory__gradient_checkpointing=checkpointing)
        prediction = predict(recipe)
        needed = prediction.peak_over(*STEP_PHASES).allocated / GIB + besides
        step = step_seconds(recipe, prediction, CARDS["L40S"])
        lines.append(f"| {name}, {'' if checkpointing else 'no '}checkpointing | {memory:.2f} | {larger:.2f} | "
                     f"{needed:.2f} | {needed / memory - 1:+.1%} | {needed / larger - 1:+.1%} | {seconds:.2f} | "
                     f"{step:.2f} | {step / seconds - 1:+.0%} | {time.process_time() - start:.1f} |")
        print(lines[-1], flush=True)
    return lines
