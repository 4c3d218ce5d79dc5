"""Lists the overrides that would reduce a run's GPU memory, with the saved memory and the added time of each.

Plans show this list. The error message of a run that does not fit also contains the list. Saved memory and added time
are computed from the prediction of the run as it is. No option is rehearsed, so these figures are approximate.
`extrapolate_sample_batch` estimates how many images at a time fit in memory that stays free.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dreambooth.config.enums import FP8_CAPABILITY, BaseWeights, Dtype, EmaDevice, OptimizerKind, Weights
from dreambooth.config.hardware import presets
from dreambooth.config.recipe import Recipe
from dreambooth.models.block_swap import SLOTS
from dreambooth.planner.gpu_specs import Card, cuda_overhead_gib, find_card
from dreambooth.planner.prediction import STEP_PHASES, Prediction
from dreambooth.planner.skeleton_models import count_trained_weights
from dreambooth.planner.time_and_cost import OPTIMIZER_STATE_BYTES, WEIGHT_BYTES, step_seconds
from dreambooth.planner.trace_replay import Usage
from dreambooth.utils.hardware import GIB

CHECKPOINTED_SHARE = 0.12  # share of activations that checkpointing keeps; SD 1.5 at 512 px: 0.26 of 2 GiB per sample
MIN_SAVED_GIB = 0.05  # options that save less are not listed
MAX_SAMPLE_BATCH = 32  # images at a time; larger batches are not suggested
RECOMPUTED_FORWARD = 4 / 3  # operations of a step that computes its forward pass twice, relative to a plain step


@dataclass(frozen=True)
class MemoryOption:
    """One or more overrides that reduce GPU memory."""

    overrides: str
    saved_gib: float  # approximate
    extra_seconds: float | None  # per step, negative if faster; None: the card's speed or the effect is unknown
    exact: bool = False  # True: the results of the run do not change


def list_memory_options(recipe: Recipe, prediction: Prediction) -> list[MemoryOption]:
    """Return the options for this run that save at least MIN_SAVED_GIB.

    If generating images needs the most memory, the options for generating images come first. The options for a training
    step follow: first the options that do not change the results, then the options that do.
    """
    options = [*_sampling_options(recipe, prediction), *_exact_options(recipe, prediction),
               *_inexact_options(recipe, prediction)]
    return [option for option in options if option.saved_gib >= MIN_SAVED_GIB]


def describe_memory_options(recipe: Recipe, prediction: Prediction) -> str:
    """Return the text that names the options in the error message for a run that does not fit.

    If a training step fits and generating images does not, the message names only the options for generating images.
    """
    auto = [] if recipe.memory.auto else ["memory=auto (saves memory without changing the results)"]
    step_gib = prediction.peak_over(*STEP_PHASES).reserved / GIB + cuda_overhead_gib(recipe.hardware.gpu)
    step_fits = step_gib <= (recipe.hardware.usable_vram_gib or 0)
    options = list(_sampling_options(recipe, prediction)) if step_fits else list_memory_options(recipe, prediction)
    phrases = [f"{option.overrides} (saves about {option.saved_gib:.1f} GiB)" for option in options]
    present = recipe.hardware.usable_vram_gib or 0.0
    larger = min(((machine.usable_vram_gib, name) for name, machine in presets().items()
                  if machine.gpus == 1 and (machine.usable_vram_gib or 0.0) > present), default=None)
    return "; ".join([*auto, *phrases, f"a larger card, such as hardware={larger[1]}" if larger else "a larger card"])


def extrapolate_sample_batch(recipe: Recipe, prediction: Prediction, allowed: float) -> int | None:
    """Return a larger prior.sample_batch_size that should fit, from the memory of the present one; None: there is none.

    It is a power of two, at most MAX_SAMPLE_BATCH, and no more than the class images or the images that evaluation
    generates of a prompt.

    Args:
        allowed: GiB of card memory that the run may use.
    """
    present = recipe.prior.sample_batch_size
    most = max(recipe.prior.num_class_images if recipe.with_class_images else 0,
               recipe.evaluate.images_per_prompt if recipe.evaluate.encoders else 0)
    free = allowed - cuda_overhead_gib(recipe.hardware.gpu)
    for phase in ("class_images", "sample", "evaluate"):
        if usage := prediction.by_phase.get(phase):
            batch = max(present, recipe.sample.images_per_prompt) if phase == "sample" else present
            if per_batch := _generating_gib(usage):
                most = min(most, int((free - usage.allocated / GIB + per_batch) * batch / per_batch))
    size = 2 ** (min(most, MAX_SAMPLE_BATCH).bit_length() - 1) if most > 0 else 0
    return size if size > present else None


def _generating_gib(usage: Usage) -> float:
    """Return the GiB that grow with the number of images that are generated at a time."""
    return (usage.by_category.get("temporaries", 0) + usage.by_category.get("activations", 0)) / GIB


def _sampling_options(recipe: Recipe, prediction: Prediction) -> Iterator[MemoryOption]:
    """Yield the options for generating images; none if another phase needs more memory than generating images."""
    if prediction.peak_phase in (*STEP_PHASES, "prompts"):
        return
    peak, batch_size = prediction.peak, recipe.prior.sample_batch_size
    per_batch = _generating_gib(peak)
    if prediction.peak_phase == "sample" and recipe.sample.images_per_prompt > 1:
        batch_size = max(batch_size, recipe.sample.images_per_prompt)
        yield MemoryOption("sample.images_per_prompt=1 prior.sample_batch_size=1", per_batch * (1 - 1 / batch_size),
                           None, exact=True)
    elif batch_size > 1:
        yield MemoryOption("prior.sample_batch_size=1", per_batch * (1 - 1 / batch_size), None, exact=True)
    if (side := recipe.model.resolution) > 512:
        yield MemoryOption("model.resolution=512", per_batch * (1 - (512 / side) ** 2), None)


def _exact_options(recipe: Recipe, prediction: Prediction) -> Iterator[MemoryOption]:
    """Yield the options for a training step that do not change the results."""
    memory, fp32_gib = recipe.memory, 4 * prediction.trained_parameters / GIB
    checkpointed = replace(recipe, memory=memory.copy_with(gradient_checkpointing=True))
    recomputed_gib, flops = 0.0, 1.0  # what checkpointing saves and costs, if it is not on already
    if not memory.gradient_checkpointing:
        recomputed_gib, flops = activations_gib(prediction) * (1 - CHECKPOINTED_SHARE), RECOMPUTED_FORWARD
        cost = _extra_seconds(recipe, prediction, checkpointed, flops)
        yield MemoryOption("memory.gradient_checkpointing=true", recomputed_gib, cost, exact=True)
    if recipe.allows_optimizer_in_backward and not memory.optimizer_in_backward:
        # Clipping and fp16's overflow check need all gradients before the first update, so a second backward pass is
        # necessary.
        two_passes = recipe.train.max_grad_norm is not None or recipe.precision.dtype is Dtype.fp16
        cost = _extra_seconds(recipe, prediction, flops=2.0 if two_passes else 1.0)
        yield MemoryOption("memory.optimizer_in_backward=true", fp32_gib, cost, exact=True)
    if (most := len(prediction.block_bytes)) > (memory.swap_blocks or 0) and recipe.allows_swapped_blocks:
        largest = max(prediction.block_bytes)
        saved = (_resident_bytes(recipe, prediction) - SLOTS * largest) / GIB + recomputed_gib
        # A forward and backward pass copies each block twice, except those in the slots at the turn.
        copied = 2 * max(0, most - SLOTS) * largest * recipe.micro_batches[1]
        swapped = replace(prediction, copied_bytes=(copied, prediction.copied_bytes[1]))
        yield MemoryOption(f"memory.swap_blocks={most}" + " memory.gradient_checkpointing=true" *
                           (not memory.gradient_checkpointing), saved,
                           _extra_seconds(recipe, prediction, checkpointed, flops, swapped), exact=True)
    if recipe.train.use_ema and memory.ema_device is EmaDevice.same and not memory.offload_optimizer:
        on_cpu = replace(recipe, memory=memory.copy_with(ema_device=EmaDevice.cpu))
        yield MemoryOption("memory.ema_device=cpu", fp32_gib, _extra_seconds(recipe, prediction, on_cpu), exact=True)


def _inexact_options(recipe: Recipe, prediction: Prediction) -> Iterator[MemoryOption]:
    """Yield the options for a training step that change the results."""
    memory, train = recipe.memory, recipe.train
    gib_per_byte = prediction.trained_parameters / GIB  # GiB for one byte per trained parameter
    state = OPTIMIZER_STATE_BYTES[recipe.optimizer.kind]
    if recipe.method.low_rank:
        yield from _quantised_options(recipe, prediction)
        yield from _batch_options(recipe, prediction)
        return
    if not memory.offload_optimizer and not memory.fully_shard:
        if state > OPTIMIZER_STATE_BYTES[OptimizerKind.adamw8bit]:
            eight_bit = replace(recipe, optimizer=recipe.optimizer.copy_with(kind=OptimizerKind.adamw8bit))
            yield MemoryOption("optimizer=adamw8bit",
                               gib_per_byte * (state - OPTIMIZER_STATE_BYTES[OptimizerKind.adamw8bit]),
                               _extra_seconds(recipe, prediction, eight_bit))
        if recipe.allows_offload_optimizer:
            offloaded = replace(recipe, memory=memory.copy_with(offload_optimizer=True, optimizer_in_backward=False))
            yield MemoryOption("memory.offload_optimizer=true" + " memory.optimizer_in_backward=false" *
                               memory.optimizer_in_backward, gib_per_byte * (state + 2),
                               _extra_seconds(recipe, prediction, offloaded))
    if (memory.weights is Weights.full and recipe.precision.dtype is not Dtype.fp32 and not memory.offload_optimizer
            and not memory.fully_shard and recipe.optimizer.kind.allows_half_weights and not train.channels_last
            and train.text_encoder_learning_rate is None):
        yield MemoryOption("memory.weights=half memory.rounding=stochastic", gib_per_byte * 2, None)
    if train.use_ema and memory.ema_device is EmaDevice.same and not memory.offload_optimizer:
        without_ema = replace(recipe, train=train.copy_with(use_ema=False))
        yield MemoryOption("train.use_ema=false", gib_per_byte * 4, _extra_seconds(recipe, prediction, without_ema))
    if train.train_text_encoder:
        frozen = replace(recipe, train=train.copy_with(train_text_encoder=False))
        text_parameters = count_trained_weights(recipe) - count_trained_weights(frozen)
        rate = " train.text_encoder_learning_rate=null" * (train.text_encoder_learning_rate is not None)
        yield MemoryOption(f"train.train_text_encoder=false{rate}", text_parameters / GIB * (8 + state), None)
    yield from _batch_options(recipe, prediction)
    if memory.weights is Weights.full and not memory.offload_optimizer:
        ema_bytes = 4 * (train.use_ema and memory.ema_device is EmaDevice.same)
        optimizer = " optimizer=adamw" * (recipe.optimizer.kind is OptimizerKind.muon)
        yield MemoryOption("method=lora" + " memory.fully_shard=false" * memory.fully_shard + optimizer,
                           gib_per_byte * (6 + state + ema_bytes),
                           _extra_seconds(recipe, prediction, flops=2 / 3))


def _resident_bytes(recipe: Recipe, prediction: Prediction) -> float:
    """Return the bytes of the denoiser's blocks on the card: those that are not swapped, and those in the slots."""
    most = len(prediction.block_bytes)
    resident = min(most, most - (recipe.memory.swap_blocks or 0) + SLOTS)
    return resident * sum(prediction.block_bytes) / max(most, 1)


def _quantised_options(recipe: Recipe, prediction: Prediction) -> Iterator[MemoryOption]:
    """Yield the formats of the frozen base with fewer bits than its present format.

    Only the denoiser's blocks on the card are counted, because most of its other weights are small.
    """
    if recipe.method.base_weights is not BaseWeights.half or recipe.precision.dtype is Dtype.fp32:
        return
    half = _resident_bytes(recipe, prediction)
    formats = [BaseWeights.int8]
    if (recipe.hardware.compute_capability or 0) >= FP8_CAPABILITY:
        formats.append(BaseWeights.fp8)
    if not recipe.memory.swap_blocks:
        formats.append(BaseWeights.nf4)
    for kind in formats:
        changed = replace(recipe, method=recipe.method.copy_with(base_weights=kind))
        yield MemoryOption(f"method.base_weights={kind.value}", (1 - WEIGHT_BYTES[kind] / 2) * half / GIB,
                           _extra_seconds(recipe, prediction, changed))


def _batch_options(recipe: Recipe, prediction: Prediction) -> Iterator[MemoryOption]:
    """Yield the options that make a training step smaller: batch size 1, and a resolution of 512 pixels."""
    size = recipe.train.train_batch_size
    if size > 1:
        several = recipe.memory.optimizer_in_backward and (recipe.train.global_batch_size or 1) > 1
        gradients = several * 4 * prediction.trained_parameters / GIB  # which then exist at the same time
        yield MemoryOption("train.train_batch_size=1" + " memory.optimizer_in_backward=false" * several,
                           activations_gib(prediction) * (1 - 1 / size) - gradients,
                           _extra_seconds(recipe, prediction,
                                          flops=1.0 if recipe.train.global_batch_size else 1 / size))
    if (side := recipe.model.resolution) > 512 and prediction.peak_phase in STEP_PHASES:
        yield MemoryOption("model.resolution=512", activations_gib(prediction) * (1 - (512 / side) ** 2), None)


def activations_gib(prediction: Prediction) -> float:
    """Return the GiB of activations that a training step stores for its backward pass."""
    return prediction.peak_over(*STEP_PHASES).by_category.get("activations", 0) / GIB


def _extra_seconds(recipe: Recipe, prediction: Prediction, changed: Recipe | None = None,
                   flops: float = 1.0, changed_prediction: Prediction | None = None) -> float | None:
    """Return how many seconds longer a step takes with a memory option; None if the card is unknown.

    Args:
        changed: the recipe with the option; None: estimate the time from `flops` only.
        flops: operations of a step with the option, divided by the operations of a step of `recipe`.
        changed_prediction: the prediction with the option; None: only the recipe and the operations change.
    """
    card: Card | None = find_card(recipe.hardware.gpu)
    if card is None:
        return None
    return (step_seconds(changed or recipe, changed_prediction or prediction, card, flops)
            - step_seconds(recipe, prediction, card))
