"""What would take less of the card, with what each way saves and costs: for a plan, and for a run that does not fit.

Counted from a prediction and not rehearsed, so that every figure is about right and no more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dreambooth.config.enums import Dtype, EmaDevice, OptimizerKind, Weights
from dreambooth.config.recipe import Recipe
from dreambooth.planner.gpu_specs import Card, card_of, fixed_gib
from dreambooth.planner.prediction import STEP, Prediction
from dreambooth.planner.skeleton_models import trained_weights
from dreambooth.planner.time_and_cost import step_seconds
from dreambooth.utils.hardware import GIB

STATE_BYTES = {  # an element of the optimizer's state
    OptimizerKind.adamw: 8.0, OptimizerKind.adamw8bit: 2.03, OptimizerKind.paged_adamw8bit: 0.0,
    OptimizerKind.adafactor: 2.0,
}
KEPT_SHARE = 0.12  # of the activations, with checkpointing: SD 1.5 at 512 px, 0.26 of 2 GiB a row
LEAST = 0.05  # GiB; what saves less is not worth a line
AGAIN = 4 / 3  # operations of a step whose forward pass is computed twice


@dataclass(frozen=True)
class Way:
    """Overrides to type."""

    what: str
    saves: float  # GiB of the card, about
    seconds: float | None  # more a step (below 0: less); None: nothing is known of the card's speed, or of this
    exact: bool = False  # changes no number of the run


def ways(recipe: Recipe, prediction: Prediction) -> list[Way]:
    """What is left to do: for pictures where these need most, then for a step, what changes no number first."""
    found = [*_fewer_pictures(recipe, prediction), *_exact(recipe, prediction), *_given_up(recipe, prediction)]
    return [way for way in found if way.saves >= LEAST]


def named(recipe: Recipe, prediction: Prediction) -> str:
    """The same in a sentence's words, of a run that does not fit; of a step only if it is what does not."""
    auto = [] if recipe.memory.auto else ["memory=auto (levers that change no number)"]
    step = prediction.most(*STEP).reserved / GIB + fixed_gib(recipe.hardware.gpu)
    fits = step <= (recipe.hardware.usable_vram_gib or 0)
    known = list(_fewer_pictures(recipe, prediction)) if fits else ways(recipe, prediction)
    told = [f"{way.what} (saves about {way.saves:.1f} GiB)" for way in known]
    return "; ".join([*auto, *told, "a larger card, such as hardware=g5"])


def _exact(recipe: Recipe, prediction: Prediction) -> Iterator[Way]:
    memory, trained = recipe.memory, 4 * prediction.trained / GIB
    if not memory.gradient_checkpointing:
        saved = activations_gib(prediction) * (1 - KEPT_SHARE)
        yield Way("memory.gradient_checkpointing=true", saved, _seconds(recipe, prediction, flops=AGAIN), exact=True)
    if recipe.may_step_in_backward and not memory.optimizer_in_backward:
        known_first = recipe.train.max_grad_norm is not None or recipe.precision.dtype is Dtype.fp16
        cost = _seconds(recipe, prediction, flops=2.0 if known_first else 1.0)
        yield Way("memory.optimizer_in_backward=true", trained, cost, exact=True)
    if recipe.train.use_ema and memory.ema_device is EmaDevice.same and not memory.offload_optimizer:
        away = replace(recipe, memory=memory.changed(ema_device=EmaDevice.cpu))
        yield Way("memory.ema_device=cpu", trained, _seconds(recipe, prediction, away), exact=True)


def _given_up(recipe: Recipe, prediction: Prediction) -> Iterator[Way]:
    memory, train, millions = recipe.memory, recipe.train, prediction.trained / GIB
    state = STATE_BYTES[recipe.optimizer.kind]
    if recipe.method.low_rank:
        yield from _smaller_batch(recipe, prediction)
        return
    if not memory.offload_optimizer:
        if recipe.optimizer.kind is OptimizerKind.adamw:
            eight = replace(recipe, optimizer=recipe.optimizer.changed(kind=OptimizerKind.adamw8bit))
            yield Way("optimizer=adamw8bit", millions * (state - STATE_BYTES[OptimizerKind.adamw8bit]),
                      _seconds(recipe, prediction, eight))
        if recipe.may_offload:
            on_host = replace(recipe, memory=memory.changed(offload_optimizer=True, optimizer_in_backward=False))
            yield Way("memory.offload_optimizer=true" + " memory.optimizer_in_backward=false" *
                      memory.optimizer_in_backward, millions * (state + 2), _seconds(recipe, prediction, on_host))
    if memory.weights is Weights.full and recipe.precision.dtype is not Dtype.fp32 and not memory.offload_optimizer:
        yield Way("memory.weights=half memory.rounding=stochastic", millions * 2, None)
    if train.use_ema and memory.ema_device is EmaDevice.same and not memory.offload_optimizer:
        none = replace(recipe, train=train.changed(use_ema=False))
        yield Way("train.use_ema=false", millions * 4, _seconds(recipe, prediction, none))
    if train.train_text_encoder:
        frozen = replace(recipe, train=train.changed(train_text_encoder=False))
        text = trained_weights(recipe) - trained_weights(frozen)
        yield Way("train.train_text_encoder=false", text / GIB * (8 + state), None)
    yield from _smaller_batch(recipe, prediction)
    if memory.weights is Weights.full and not memory.offload_optimizer:
        yield Way("method=lora", millions * (6 + state + 4 * (train.use_ema and memory.ema_device is EmaDevice.same)),
                  _seconds(recipe, prediction, flops=2 / 3))


def _smaller_batch(recipe: Recipe, prediction: Prediction) -> Iterator[Way]:
    size = recipe.train.train_batch_size
    if size > 1:
        yield Way("train.train_batch_size=1", activations_gib(prediction) * (1 - 1 / size),
                  _seconds(recipe, prediction, flops=1 / size))
    if (side := recipe.model.resolution) > 512 and prediction.peak_phase in STEP:
        yield Way("model.resolution=512", activations_gib(prediction) * (1 - (512 / side) ** 2), None)


def _fewer_pictures(recipe: Recipe, prediction: Prediction) -> Iterator[Way]:
    """Where drawing takes more than a step does."""
    if prediction.peak_phase in STEP:
        return
    peak, size = prediction.peak, recipe.prior.sample_batch_size
    passing = (peak.by_category.get("temporaries", 0) + peak.by_category.get("activations", 0)) / GIB
    if prediction.peak_phase == "sample" and recipe.sample.images_per_prompt > 1:
        size = max(size, recipe.sample.images_per_prompt)
        yield Way("sample.images_per_prompt=1 prior.sample_batch_size=1", passing * (1 - 1 / size), None, exact=True)
    elif size > 1:
        yield Way("prior.sample_batch_size=1", passing * (1 - 1 / size), None, exact=True)
    if (side := recipe.model.resolution) > 512:
        yield Way("model.resolution=512", passing * (1 - (512 / side) ** 2), None)


def activations_gib(prediction: Prediction) -> float:
    """GiB that a forward pass holds when the backward pass begins: so much comes on top of the rest."""
    return prediction.most(*STEP).by_category.get("activations", 0) / GIB


def _seconds(recipe: Recipe, prediction: Prediction, changed: Recipe | None = None, flops: float = 1.0) -> float | None:
    """A step of the changed run less one of this run; `flops`: its operations as a share of this run's."""
    card: Card | None = card_of(recipe.hardware.gpu)
    if card is None:
        return None
    return step_seconds(changed or recipe, prediction, card, flops) - step_seconds(recipe, prediction, card)
