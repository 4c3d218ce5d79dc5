"""Implements memory=auto, which chooses the fastest memory options that fit the card and do not change the results.

`CANDIDATES` lists combinations of options, which are tried in this order, from the fastest to the slowest.
`_minimum_gib` calculates a lower bound of a candidate's memory from the sizes of weights, optimizer state, EMA and
gradients, and from a lower bound of its activations. The result rules out most candidates without a rehearsal. The
remaining candidates are rehearsed until one fits. If a rehearsed candidate does not fit, the size of its activations
becomes the lower bound for all later candidates with the same setting of gradient checkpointing. The other options
change only the memory of trained weights. If they cannot save enough, candidates that differ in them alone are ruled
out too; with a small adapter, they are not tried at all. If the training step of a candidate fits and its image
generation does not, images are generated one at a time. If no candidate fits, as many blocks of a frozen transformer as
are needed live in host memory (models/block_swap.py).

Options that are already on stay on. Optimizer, precision, clipping and the trained parts never change. If no candidate
fits, the error message lists changes to these settings, and the memory that each change would save.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dreambooth.config.enums import EmaDevice, Weights
from dreambooth.config.recipe import Recipe
from dreambooth.errors import DoesNotFit
from dreambooth.models.block_swap import SLOTS
from dreambooth.planner.gpu_specs import cuda_overhead_gib
from dreambooth.planner.memory_options import activations_gib, describe_memory_options, extrapolate_sample_batch
from dreambooth.planner.prediction import STEP_PHASES, Prediction
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.skeleton_models import count_trained_weights, find_architecture
from dreambooth.planner.time_and_cost import OPTIMIZER_STATE_BYTES, host_gib
from dreambooth.utils.hardware import GIB

MAX_CARD_SHARE = 0.95  # largest share of the card that a chosen candidate may use
SAVED_BYTES = 4 + 4 + 2  # per trained weight, by all options except checkpointing: gradient, EMA, autocast's copy
FRAGMENTS = 2.0  # upper bound of the memory that these options save, divided by the bytes that they save
MIN_SAVED_SHARE = 0.05  # of the card; these options are not tried if they save less together
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}
IN_BACKWARD: dict[str, Any] = {"optimizer_in_backward": True, "autocast_cache": False}
EMA_ON_CPU: dict[str, Any] = {"ema_device": EmaDevice.cpu}
# Ordered by cost on a T4: checkpointing takes a quarter of a step's time, an optimizer step inside the backward pass
# needs two backward passes, and the EMA on the CPU needs copies between card and host.
CANDIDATES: tuple[dict[str, Any], ...] = (
    {}, CHECKPOINTING, IN_BACKWARD, CHECKPOINTING | IN_BACKWARD, EMA_ON_CPU, CHECKPOINTING | EMA_ON_CPU,
    IN_BACKWARD | EMA_ON_CPU, CHECKPOINTING | IN_BACKWARD | EMA_ON_CPU)


@dataclass(frozen=True)
class Choice:
    """The recipe that a run will use, with its prediction."""

    recipe: Recipe
    prediction: Prediction
    added: tuple[str, ...]  # the chosen overrides
    why: str  # explanation of the choice; empty if there was nothing to choose


def apply_auto_memory(recipe: Recipe, processes: int = 1) -> tuple[Recipe, dict[str, float], str]:
    """Choose memory options for a run that is about to start.

    Args:
        processes: number of processes that train together.

    Returns:
        The recipe with the chosen options; the predicted reserved GiB of each phase that runtime/memory_meter.py
        measures; and a message for the user. Without memory.auto, on a CPU, or if the size of the card is unknown,
        nothing is chosen or predicted: the recipe is returned unchanged, and the other two results are empty.

    Raises:
        DoesNotFit: no combination of CANDIDATES fits the card, or the machine has too little host memory. The message
            lists overrides to type; for the card also the memory that each saves.
    """
    if not recipe.memory.auto or recipe.device != "cuda" or recipe.hardware.usable_vram_gib is None:
        return recipe, {}, ""
    choice = choose_memory_options(recipe, processes=processes)
    if card_gib(choice.recipe, choice.prediction) > recipe.hardware.usable_vram_gib:
        raise DoesNotFit(describe_shortfall(choice.recipe, choice.prediction))
    of_this_machine = choice.recipe.with_processes(min(processes, recipe.hardware.gpus))
    if problem := host_shortfall(of_this_machine, choice.prediction):
        raise DoesNotFit(problem)
    phases = choice.prediction.by_phase
    expected = {phase: usage.reserved / GIB for phase, usage in phases.items() if phase not in STEP_PHASES}
    expected["load"] = max(expected["load"], expected.pop("prompts", 0.0))  # one phase in the run's measurements
    expected["step"] = choice.prediction.peak_over(*STEP_PHASES).reserved / GIB
    return choice.recipe, expected, f"memory=auto: {choice.why} {' '.join(choice.added)}".rstrip()


def choose_memory_options(recipe: Recipe, rehearse: Callable[[Recipe], Prediction] = predict,
                          processes: int | None = None) -> Choice:
    """Return the recipe with the first combination of CANDIDATES that fits the card, and its prediction.

    Without memory.auto, on a CPU, or if the size of the card is unknown, the recipe is rehearsed and returned
    unchanged. If no combination fits, return the recipe with the last one, which needs the least memory.

    Args:
        rehearse: predicts the memory of a recipe.
        processes: number of processes that train together; None: as many as hardware.gpus.
    """
    recipe = recipe if processes is None else recipe.with_processes(processes)
    limit = recipe.hardware.usable_vram_gib
    if not recipe.memory.auto or recipe.device != "cuda" or limit is None:
        return Choice(recipe, rehearse(recipe), (), "")
    allowed = MAX_CARD_SHARE * limit
    trained = count_trained_weights(recipe)
    # Lower bounds of the activations in GiB, with and without checkpointing.
    activations = {checkpointed: _min_activations_gib(recipe, checkpointed) for checkpointed in (True, False)}
    minimum = {True: 0.0, False: 0.0}  # lower bounds of the memory in GiB, with and without checkpointing
    best: Choice | None = None
    small = SAVED_BYTES * trained / GIB < MIN_SAVED_SHARE * limit
    candidates = _candidates(recipe, ({}, CHECKPOINTING) if small else CANDIDATES)
    for options in candidates:
        candidate = replace(recipe, memory=recipe.memory.copy_with(**options))
        checkpointed = candidate.memory.gradient_checkpointing
        is_last = options == candidates[-1]
        bound = max(minimum[checkpointed], _minimum_gib(candidate, trained, activations[checkpointed]))
        if not is_last and bound > allowed:
            continue
        choice = Choice(candidate, rehearse(candidate), _overrides(options), "")
        best = _with_smaller_sample_batch(choice, allowed, rehearse)
        needed = card_gib(best.recipe, best.prediction)
        if needed <= allowed:
            return replace(best, why=_explain(best.added, needed, limit))
        activations[checkpointed] = max(activations[checkpointed], activations_gib(best.prediction))
        minimum[checkpointed] = max(minimum[checkpointed], needed - FRAGMENTS * SAVED_BYTES * trained / GIB)
    assert best is not None  # the last candidate is always rehearsed
    best = _with_swapped_blocks(best, allowed, rehearse)
    needed = card_gib(best.recipe, best.prediction)
    if needed <= allowed:
        return replace(best, why=_explain(best.added, needed, limit))
    problem = f"fills more than {MAX_CARD_SHARE:.0%} of the card" if needed <= limit else "does not fit"
    return replace(best, why=f"the smallest set that changes no number {problem}: {needed:.1f} of {limit:g} GiB")


def card_gib(recipe: Recipe, prediction: Prediction) -> float:
    """Return the peak GiB that a run uses on the card: PyTorch's reserved memory and the overhead of the process."""
    return prediction.reserved / GIB + cuda_overhead_gib(recipe.hardware.gpu)


def describe_shortfall(recipe: Recipe, prediction: Prediction) -> str:
    """Return one sentence with the memory that the run needs and the overrides that the user can type."""
    limit = recipe.hardware.usable_vram_gib or 0.0
    return (f"this run needs {card_gib(recipe, prediction):.1f} GiB, most of it in {prediction.peak_phase}, and "
            f"{recipe.hardware.gpu or 'the card'} has {limit:g}: "
            f"type one of {describe_memory_options(recipe, prediction)}")


def host_shortfall(recipe: Recipe, prediction: Prediction) -> str:
    """Return a sentence with the overrides to type if the machine has too little host memory; empty if it suffices.

    It is also empty if the size of the host memory is unknown.
    """
    needed, available = host_gib(recipe, prediction), recipe.hardware.host_ram_gib
    if available is None or needed <= available:
        return ""
    return (f"this run needs {needed:.1f} GiB of host memory and the machine has {available:g}: type "
            "hardware.instance_type, hardware.host_ram_gib and hardware.price_usd_hour of a larger machine with the "
            "same card")


def _candidates(recipe: Recipe, combinations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each combination of options, the memory settings of this run that it changes.

    Settings that have no effect in this run are omitted, and so are settings that the run does not allow.
    """
    candidates: list[dict[str, Any]] = []
    for combination in combinations:
        options = {key: value for key, value in combination.items() if getattr(recipe.memory, key) != value}
        if not recipe.train.use_ema:
            options.pop("ema_device", None)
        if options.get("optimizer_in_backward") and not recipe.allows_optimizer_in_backward:
            del options["optimizer_in_backward"]
        if options not in candidates:
            candidates.append(options)
    return candidates


def _min_activations_gib(recipe: Recipe, checkpointed: bool) -> float:
    """Return a lower bound in GiB for the activations that a forward pass of the denoiser keeps."""
    rows = recipe.micro_batches[0] + (0 if recipe.two_passes else recipe.class_rows)
    family, _ = find_architecture(recipe)
    share = 0.5 if recipe.method.low_rank else 1  # frozen layers keep fewer activations
    return share * family.activations_gib[checkpointed] * rows * (recipe.model.resolution / 512) ** 2


def _minimum_gib(candidate: Recipe, trained: int, activations: float) -> float:
    """Return a lower bound in GiB for the card memory of a training step.

    The bound includes activations or gradients, whichever are larger, because the backward pass releases activations
    while it computes gradients.

    Args:
        trained: number of trained weights.
        activations: a lower bound of the activations, in GiB.
    """
    memory = candidate.memory
    if memory.fully_shard:
        trained //= candidate.hardware.gpus
    bytes_per_weight = 4.0 + (0 if memory.offload_optimizer else OPTIMIZER_STATE_BYTES[candidate.optimizer.kind])
    bytes_per_weight += 4.0 if candidate.train.use_ema and memory.ema_device is EmaDevice.same else 0.0
    if memory.offload_optimizer or memory.weights is Weights.half:
        bytes_per_weight -= 2.0
    gradients = 0.0 if memory.optimizer_in_backward or memory.offload_optimizer else 4.0 * trained / GIB
    return bytes_per_weight * trained / GIB + max(activations, gradients) + cuda_overhead_gib(candidate.hardware.gpu)


def larger_sample_batch(choice: Choice) -> int | None:
    """Return a larger prior.sample_batch_size with which a rehearsal fits the card; None: none was found.

    No run chooses it by itself: with another batch size, it is another run, with class images of its own.
    """
    recipe, limit = choice.recipe, choice.recipe.hardware.usable_vram_gib
    if recipe.device != "cuda" or limit is None:
        return None
    allowed = MAX_CARD_SHARE * limit
    if card_gib(recipe, choice.prediction) > allowed:
        return None
    size = extrapolate_sample_batch(recipe, choice.prediction, allowed) or 0
    while size > recipe.prior.sample_batch_size:
        larger = replace(recipe, prior=recipe.prior.copy_with(sample_batch_size=size))
        if card_gib(larger, predict(larger)) <= allowed:
            return size
        size //= 2
    return None


def _with_smaller_sample_batch(choice: Choice, allowed: float, rehearse: Callable[[Recipe], Prediction]) -> Choice:
    """Return `choice`, changed to generate one image at a time if this is needed to fit the card.

    The choice is changed only if its training step fits and its image generation does not.

    Args:
        allowed: GiB of card memory that the run may use.
    """
    recipe = choice.recipe
    step = choice.prediction.peak_over(*STEP_PHASES).reserved / GIB + cuda_overhead_gib(recipe.hardware.gpu)
    if step > allowed or card_gib(recipe, choice.prediction) <= allowed or recipe.prior.sample_batch_size == 1:
        return choice
    one_at_a_time = replace(recipe, prior=recipe.prior.copy_with(sample_batch_size=1))
    return Choice(one_at_a_time, rehearse(one_at_a_time), (*choice.added, "prior.sample_batch_size=1"), "")


def _with_swapped_blocks(choice: Choice, allowed: float, rehearse: Callable[[Recipe], Prediction]) -> Choice:
    """Return `choice`, changed to keep as many blocks of the denoiser in host memory as are needed to fit the card.

    The choice is not changed if its recipe allows no swapped blocks, or swaps blocks already. The number of blocks is
    calculated from their size. If the rehearsal needs more memory than calculated, it is corrected once.

    Args:
        allowed: GiB of card memory that the run may use.
    """
    recipe, blocks, added = choice.recipe, choice.prediction.block_bytes, choice.added
    if recipe.memory.swap_blocks or not blocks or not recipe.allows_swapped_blocks:
        return choice
    prompts = choice.prediction.by_phase.get("prompts")
    if prompts and prompts.reserved / GIB + cuda_overhead_gib(recipe.hardware.gpu) > allowed:
        return choice  # the text encoders alone do not fit
    count = SLOTS
    for _ in range(2):
        excess = card_gib(choice.recipe, choice.prediction) - allowed
        if excess <= 0 or count == len(blocks):
            break
        count = min(len(blocks), count + math.ceil(excess * GIB / min(blocks)))
        swapped = replace(recipe, memory=recipe.memory.copy_with(swap_blocks=count))
        choice = Choice(swapped, rehearse(swapped), (*added, f"memory.swap_blocks={count}"), "")
    return choice


def _overrides(options: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"memory.{key}={_format_value(value)}" for key, value in options.items())


def _format_value(value: Any) -> str:
    return str(getattr(value, "value", value)).lower()


def _explain(added: tuple[str, ...], needed: float, limit: float) -> str:
    if not added:
        return f"nothing was needed: {needed:.1f} of {limit:g} GiB"
    return f"the fastest set that fits and changes no number: {needed:.1f} of {limit:g} GiB"
