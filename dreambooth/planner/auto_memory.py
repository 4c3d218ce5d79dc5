"""memory=auto: the fastest set of levers that fits the card and changes no number of the run.

Candidates are in the order of what they cost. Weights, optimizer state, EMA and gradients are counted first (`_floor`),
which rules most of them out; the next one is rehearsed, and what its activations take sharpens the count for the rest.
If a set fits the step and not the drawing of pictures, these are drawn one at a time.
Levers that are on already stay on. Optimizer, precision, clipping and what is trained are never touched: they are only
named, with what each would save, when nothing fits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dreambooth.config.enums import EmaDevice, Weights
from dreambooth.config.recipe import Recipe
from dreambooth.errors import DoesNotFit
from dreambooth.planner.gpu_specs import fixed_gib
from dreambooth.planner.memory_options import STATE_BYTES, activations_gib, named
from dreambooth.planner.prediction import STEP, Prediction
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.skeleton_models import folder_of, trained_weights
from dreambooth.utils.hardware import GIB

SHARE = 0.95  # of the card that a chosen set may fill
KEPT = {True: 0.2, False: 1.8}  # GiB of activations a row of 512 px, with and without checkpointing; SD 1.5: 0.26, 2
KEPT_BY_TWO = {True: 0.08, False: 3.0}  # of SDXL, whose attention is deeper; predicted at 1024 px: 0.08, 3.1
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}
IN_BACKWARD: dict[str, Any] = {"optimizer_in_backward": True, "autocast_cache": False}
EMA_AWAY: dict[str, Any] = {"ema_device": EmaDevice.cpu}
LADDER: tuple[dict[str, Any], ...] = (  # by cost on a T4: checkpointing a quarter of a step, two passes, the host link
    {}, CHECKPOINTING, IN_BACKWARD, CHECKPOINTING | IN_BACKWARD, EMA_AWAY, CHECKPOINTING | EMA_AWAY,
    IN_BACKWARD | EMA_AWAY, CHECKPOINTING | IN_BACKWARD | EMA_AWAY)


@dataclass(frozen=True)
class Choice:
    """What a run will use and take. `added` are the overrides that were chosen."""

    recipe: Recipe
    prediction: Prediction
    added: tuple[str, ...]
    why: str


def card_gib(recipe: Recipe, prediction: Prediction) -> float:
    """GiB of the card that a run takes at its fullest: reserved memory, and what is gone before."""
    return prediction.reserved / GIB + fixed_gib(recipe.hardware.gpu)


def chosen(recipe: Recipe, rehearse: Callable[[Recipe], Prediction] = predict, processes: int | None = None) -> Choice:
    """Choose levers where memory.auto asks for it and a card's size is known; rehearse the run as it is otherwise.

    If nothing fits, the smallest set is returned, which then does not fit either.

    Args:
        processes: that train together; None: one on each of hardware.gpus.
    """
    recipe = recipe if processes is None else recipe.among(processes)
    limit = recipe.hardware.usable_vram_gib
    if not recipe.memory.auto or recipe.device != "cuda" or limit is None:
        return Choice(recipe, rehearse(recipe), (), "")
    room = SHARE * limit
    trained = trained_weights(recipe)
    activations = {kept: _kept(recipe, kept) for kept in (True, False)}  # GiB at least, with and without checkpointing
    best: Choice | None = None
    candidates = _candidates(recipe)
    for levers in candidates:
        candidate = replace(recipe, memory=recipe.memory.changed(**levers))
        checkpointed = candidate.memory.gradient_checkpointing
        last = levers == candidates[-1]
        if not last and _floor(candidate, trained, activations[checkpointed]) > room:
            continue
        best = _drawing(Choice(candidate, rehearse(candidate), _overrides(levers), ""), room, rehearse)
        needed = card_gib(best.recipe, best.prediction)
        if needed <= room:
            return replace(best, why=_why(best.added, needed, limit))
        activations[checkpointed] = max(activations[checkpointed], activations_gib(best.prediction))
    assert best is not None  # the last one is always rehearsed
    needed = card_gib(best.recipe, best.prediction)
    left = f"fills more than {SHARE:.0%} of the card" if needed <= limit else "does not fit"
    return replace(best, why=f"the smallest set that changes no number {left}: {needed:.1f} of {limit:g} GiB")


def _drawing(choice: Choice, room: float, rehearse: Callable[[Recipe], Prediction]) -> Choice:
    """The same with pictures drawn one at a time, if the step fits and drawing does not."""
    recipe = choice.recipe
    step = choice.prediction.most(*STEP).reserved / GIB + fixed_gib(recipe.hardware.gpu)
    if step > room or card_gib(recipe, choice.prediction) <= room or recipe.prior.sample_batch_size == 1:
        return choice
    slower = replace(recipe, prior=recipe.prior.changed(sample_batch_size=1))
    return Choice(slower, rehearse(slower), (*choice.added, "prior.sample_batch_size=1"), "")


def settled(recipe: Recipe, processes: int = 1) -> tuple[Recipe, dict[str, float], str]:
    """For a run: its recipe with the levers chosen, reserved GiB by phase of meter.py, and a sentence; nothing is
    predicted where there is nothing to choose.

    Raises:
        DoesNotFit: nothing fits; the sentence lists what could be given up and what each saves.
    """
    if not recipe.memory.auto or recipe.device != "cuda" or recipe.hardware.usable_vram_gib is None:
        return recipe, {}, ""
    choice = chosen(recipe, processes=processes)
    if card_gib(choice.recipe, choice.prediction) > recipe.hardware.usable_vram_gib:
        raise DoesNotFit(does_not_fit(choice.recipe, choice.prediction))
    phases = choice.prediction.by_phase
    expected = {phase: usage.reserved / GIB for phase, usage in phases.items() if phase not in STEP}
    expected["step"] = choice.prediction.most(*STEP).reserved / GIB
    return choice.recipe, expected, f"memory=auto: {choice.why} {' '.join(choice.added)}".rstrip()


def does_not_fit(recipe: Recipe, prediction: Prediction) -> str:
    """One sentence: how much is missing, and what to give up."""
    limit = recipe.hardware.usable_vram_gib or 0.0
    return (f"this run needs {card_gib(recipe, prediction):.1f} GiB, most of it in {prediction.peak_phase}, and "
            f"{recipe.hardware.gpu or 'the card'} has {limit:g}: type one of {named(recipe, prediction)}")


def _candidates(recipe: Recipe) -> list[dict[str, Any]]:
    """The ladder, without what would do nothing or break a rule of this run."""
    found: list[dict[str, Any]] = []
    for rung in LADDER:
        levers = {key: value for key, value in rung.items() if getattr(recipe.memory, key) != value}
        if not recipe.train.use_ema:
            levers.pop("ema_device", None)
        if levers.get("optimizer_in_backward") and not recipe.may_step_in_backward:
            del levers["optimizer_in_backward"]
        if levers not in found:
            found.append(levers)
    return found


def _floor(candidate: Recipe, trained: int, activations: float) -> float:
    """GiB that must be there at once in a step: activations at its beginning, gradients at its end."""
    memory = candidate.memory
    size = 4.0 + (0 if memory.offload_optimizer else STATE_BYTES[candidate.optimizer.kind])
    size += 4.0 if candidate.train.use_ema and memory.ema_device is EmaDevice.same else 0.0
    if memory.offload_optimizer or memory.weights is Weights.half:
        size -= 2.0
    gradients = 0.0 if memory.optimizer_in_backward or memory.offload_optimizer else 4.0 * trained / GIB
    return size * trained / GIB + max(activations, gradients) + fixed_gib(candidate.hardware.gpu)


def _kept(recipe: Recipe, checkpointed: bool) -> float:
    """GiB of activations that any forward pass of a Stable Diffusion UNet keeps."""
    rows = recipe.train.train_batch_size * (2 if recipe.with_prior and not recipe.two_passes else 1)
    two = (folder_of(recipe) / "text_encoder_2").is_dir()
    share = 0.5 if recipe.method.low_rank else 1  # frozen layers keep less
    return share * (KEPT_BY_TWO if two else KEPT)[checkpointed] * rows * (recipe.model.resolution / 512) ** 2


def _overrides(levers: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"memory.{key}={_plain(value)}" for key, value in levers.items())


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value)).lower()


def _why(added: tuple[str, ...], needed: float, limit: float) -> str:
    if not added:
        return f"nothing was needed: {needed:.1f} of {limit:g} GiB"
    return f"the fastest set that fits and changes no number: {needed:.1f} of {limit:g} GiB"
