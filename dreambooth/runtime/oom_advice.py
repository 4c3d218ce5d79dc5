"""What to type when memory ran out: what this recipe does not use yet, what changes no number first."""

from collections.abc import Iterator

from dreambooth.config.enums import Dtype, EmaDevice, LatentCache, OptimizerKind
from dreambooth.config.recipe import Recipe


def advice(phase: str, recipe: Recipe) -> str:
    """The overrides to type after memory ran out in `phase` of the run that `recipe` describes.

    For training: every lever that is left and changes no number, in one go; after those, one thing to give up.
    """
    if phase in ("class_images", "evaluate") and recipe.prior.sample_batch_size > 1:
        return "prior.sample_batch_size=1"
    if phase == "sample" and recipe.sample.images_per_prompt > 1:
        return "sample.images_per_prompt=1 prior.sample_batch_size=1"  # a batch holds at least as many
    if phase == "sample" and recipe.prior.sample_batch_size > 1:
        return "prior.sample_batch_size=1"
    if phase in ("class_images", "sample", "evaluate") and recipe.model.resolution > 512:
        return "model.resolution=512"
    if exact := list(_exact(recipe)):
        return " ".join(exact)
    return next(_concessions(recipe), "hardware=g5, or another machine with more memory")


def _exact(recipe: Recipe) -> Iterator[str]:
    """What saves memory and changes no number."""
    memory, train = recipe.memory, recipe.train
    if not memory.gradient_checkpointing:
        yield "memory.gradient_checkpointing=true"
    if not memory.cache_latents and recipe.dataset.center_crop:
        yield "memory.cache_latents=true"
    if memory.cache_latents and memory.latent_cache is LatentCache.device and recipe.device == "cpu":
        yield "memory.latent_cache=disk"
    if not memory.cache_text and not train.train_text_encoder:
        yield "memory.cache_text=true"
    if train.use_ema and recipe.device == "cuda" and memory.ema_device is EmaDevice.same:
        yield "memory.ema_device=cpu"
    if recipe.precision.dtype is not Dtype.fp32 and memory.autocast_cache:
        yield "memory.autocast_cache=false"
    if recipe.may_step_in_backward and not memory.optimizer_in_backward:
        yield "memory.optimizer_in_backward=true"


def _concessions(recipe: Recipe) -> Iterator[str]:
    """What to give up, the least first."""
    memory, train, kind = recipe.memory, recipe.train, recipe.optimizer.kind
    if train.train_batch_size > 1:
        yield "train.train_batch_size=1"
    if recipe.method.low_rank:  # its weights, optimizer and average are next to nothing
        if recipe.with_prior and not memory.split_prior:
            yield "memory.split_prior=true memory.optimizer_in_backward=false"
        if recipe.model.resolution > 512:
            yield "model.resolution=512"
        return
    if kind is OptimizerKind.adamw and not memory.offload_optimizer:
        yield "optimizer=adamw8bit"
    if recipe.device == "cuda" and not memory.offload_optimizer and recipe.may_offload:
        yield "memory.offload_optimizer=true memory.optimizer_in_backward=false"
    if train.use_ema:
        yield "train.use_ema=false"
    if train.train_text_encoder:
        yield "train.train_text_encoder=false"
    if recipe.with_prior and not memory.split_prior:
        apart = memory.optimizer_in_backward and not memory.gradient_checkpointing
        yield "memory.split_prior=true" + (" memory.optimizer_in_backward=false" if apart else "")
    if recipe.model.resolution > 512:
        yield "model.resolution=512"
