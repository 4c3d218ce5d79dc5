"""Suggests overrides after memory ran out: options that the run does not use yet.

Options that leave the results of the run unchanged are suggested first.
"""

from collections.abc import Iterator

from dreambooth.config.enums import BaseWeights, Dtype, EmaDevice, LatentCache, OptimizerKind
from dreambooth.config.recipe import Recipe


def suggest_overrides(phase: str, recipe: Recipe) -> str:
    """Return the overrides to type after memory ran out in `phase` of the run that `recipe` describes.

    If `phase` generates several images at a time, suggest one image at a time. If it generates one image of more than
    512 pixels at a time, suggest 512 pixels. In all other cases, suggest all unused memory options that leave the
    results unchanged. If there are no such options, suggest one option that changes the results.
    """
    if phase in ("class_images", "evaluate") and recipe.prior.sample_batch_size > 1:
        return "prior.sample_batch_size=1"
    if phase == "sample" and recipe.sample.images_per_prompt > 1:
        # Both settings, because a batch has at least images_per_prompt images.
        return "sample.images_per_prompt=1 prior.sample_batch_size=1"
    if phase == "sample" and recipe.prior.sample_batch_size > 1:
        return "prior.sample_batch_size=1"
    if phase in ("class_images", "sample", "evaluate") and recipe.model.resolution > 512:
        return "model.resolution=512"
    if exact := list(_exact_options(recipe)):
        return " ".join(exact)
    return next(_concessions(recipe), "hardware=g5, or another machine with more memory")


def _exact_options(recipe: Recipe) -> Iterator[str]:
    """Yield the unused options that save memory and leave the results unchanged."""
    memory, train = recipe.memory, recipe.train
    if not memory.gradient_checkpointing:
        yield "memory.gradient_checkpointing=true"
    if not memory.cache_latents and recipe.dataset.center_crop:
        yield "memory.cache_latents=true"
    if memory.cache_latents and memory.latent_cache is LatentCache.device and recipe.device == "cpu":
        yield "memory.latent_cache=disk"
    if not memory.cache_text and not recipe.encodes_in_step:
        yield "memory.cache_text=true"
    if train.use_ema and recipe.device == "cuda" and memory.ema_device is EmaDevice.same:
        yield "memory.ema_device=cpu"
    if recipe.precision.dtype is not Dtype.fp32 and memory.autocast_cache:
        yield "memory.autocast_cache=false"
    if recipe.allows_optimizer_in_backward and not memory.optimizer_in_backward:
        yield "memory.optimizer_in_backward=true"


def _concessions(recipe: Recipe) -> Iterator[str]:
    """Yield options that save memory and change the results, in order of increasing effect."""
    memory, train, kind = recipe.memory, recipe.train, recipe.optimizer.kind
    # With a global batch size, a smaller batch makes more micro-batches. Fully sharded, all processes need the same
    # number of them: with one photo each, those with one photo less would have one micro-batch less.
    photos = train.global_batch_size
    least = 2 if memory.fully_shard and photos is not None and photos % recipe.hardware.gpus else 1
    if train.train_batch_size > least:
        several = memory.optimizer_in_backward and photos is not None and photos > least
        yield f"train.train_batch_size={least}" + " memory.optimizer_in_backward=false" * several
    if recipe.method.low_rank:  # weights, optimizer state and EMA of an adapter are too small to save anything
        if recipe.with_prior and not memory.split_prior:
            yield "memory.split_prior=true memory.optimizer_in_backward=false"
        if recipe.method.base_weights is BaseWeights.half:
            yield "method.base_weights=int8"
        if recipe.model.resolution > 512:
            yield "model.resolution=512"
        return
    small = (OptimizerKind.adamw8bit, OptimizerKind.paged_adamw8bit, OptimizerKind.adafactor)
    if kind not in small and not memory.offload_optimizer and not memory.fully_shard:
        yield "optimizer=adamw8bit"
    if recipe.device == "cuda" and not memory.offload_optimizer and recipe.allows_offload_optimizer:
        yield "memory.offload_optimizer=true memory.optimizer_in_backward=false"
    if train.use_ema:
        yield "train.use_ema=false"
    if train.train_text_encoder:
        yield "train.train_text_encoder=false" + (
            "" if train.text_encoder_learning_rate is None else " train.text_encoder_learning_rate=null")
    if recipe.with_prior and not memory.split_prior:
        conflict = memory.optimizer_in_backward and not memory.gradient_checkpointing
        yield "memory.split_prior=true" + (" memory.optimizer_in_backward=false" if conflict else "")
    if recipe.model.resolution > 512:
        yield "model.resolution=512"
