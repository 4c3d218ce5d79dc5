"""Estimates the time and the price of a run from its predicted operations and bytes.

    seconds per step = operations / (peak rate x EFFICIENCY), or the copies of swapped blocks if they take longer
                       + bytes of passes over all weights / memory bandwidth + seconds of transfers to the host and back
                       + seconds of the all-reduce + overhead

Nothing in this model was measured on a GPU by this project. EFFICIENCY and the overhead are fitted on the T4 speeds
that the DreamBooth README of ShivamShrirao/diffusers publishes (batch 1 and 2, with and without checkpointing, fp16 and
fp32; read 2026-11). Other cards are assumed to reach the same shares of their own peak rates, and to have the same
overhead. Published speeds of the L40S confirm the share in half precision, and show no overhead (docs/planner.md). This
file does not import torch.
"""

import math
from dataclasses import dataclass
from functools import partial

from dreambooth.config.enums import BaseWeights, Dtype, EmaDevice, OptimizerKind
from dreambooth.config.recipe import Recipe
from dreambooth.planner.gpu_specs import Card
from dreambooth.planner.prediction import Prediction
from dreambooth.utils.hardware import GIB

EFFICIENCY = {True: 0.21, False: 0.42}  # share of the peak rate; True: half precision (tensor cores), False: fp32
BANDWIDTH_SHARE = 0.75  # share of the card's memory bandwidth in passes over all weights; an assumption
HOST_LINK = 10e9  # bytes per second between card and host, PCIe 3 x16; an assumption
HOST_MEMORY = 15e9  # bytes per second that an optimizer on a few host cores processes; an assumption
VALIDATION_DRAWS = 8  # noisy copies of each held-out photo (training/validation.py)
HELD_OUT_PHOTOS = 5  # photos in dataset.validation_dir; an assumption, since a plan reads no photos
START_UP = 120.0  # seconds of imports and loading from a local disk, without downloads; an assumption
PROCESS_GIB = 3.5  # host memory of Python, PyTorch and CUDA's libraries; an assumption

STATE_PASSES = {  # bytes that an optimizer step reads and writes per parameter, fp32 weight and gradient included
    OptimizerKind.adamw: 28, OptimizerKind.adamw8bit: 16, OptimizerKind.paged_adamw8bit: 16,
    OptimizerKind.adafactor: 24,
    # These update with one kernel per operation, whose reads and writes are counted in the code of the packages. The
    # matrix products of Muon are counted by the rehearsal; half of the weights are assumed to be matrices of blocks.
    OptimizerKind.prodigy: 136, OptimizerKind.schedule_free: 104, OptimizerKind.lion: 52, OptimizerKind.came: 140,
    OptimizerKind.ademamix8bit: 18, OptimizerKind.muon: 45,
}
# Bytes of memory on the card per trained parameter. Those of CAME and Muon are lower bounds, because they depend on the
# shapes of the weights.
OPTIMIZER_STATE_BYTES = {
    OptimizerKind.adamw: 8.0, OptimizerKind.adamw8bit: 2.03, OptimizerKind.paged_adamw8bit: 0.0,
    OptimizerKind.adafactor: 2.0, OptimizerKind.prodigy: 16.0, OptimizerKind.schedule_free: 8.0,
    OptimizerKind.lion: 4.0, OptimizerKind.came: 4.0, OptimizerKind.ademamix8bit: 3.05, OptimizerKind.muon: 4.0,
}
# Bytes of one quantised weight. With nf4, each 64 weights share a maximum of 32 bits.
WEIGHT_BYTES = {BaseWeights.int8: 1.0, BaseWeights.fp8: 1.0, BaseWeights.nf4: 4.5 / 8}
# Bytes that dequantising one weight reads and writes: 8 bits are converted, and then multiplied by their scale.
DEQUANTISED = {BaseWeights.half: 0, BaseWeights.int8: 7, BaseWeights.fp8: 7, BaseWeights.nf4: 3}


@dataclass(frozen=True)
class Estimate:
    """Time in seconds and prices in US dollars; None where the card or its price is unknown."""

    step_seconds: float | None
    run_seconds: float | None
    price_usd: float | None
    spot_price_usd: float | None
    spot_seconds: float | None = None  # of the run with the interruptions that are expected on a spot instance


def estimate(recipe: Recipe, prediction: Prediction, card: Card | None) -> Estimate:
    """Estimate the time and price of the whole run.

    The estimate includes start-up, class images, the loss on held-out photos, samples and the images for evaluation,
    but not the scoring of images, and not that train.stop_when may end the run earlier. Interruptions
    (budget.interruptions_per_hour) make a run on a spot instance longer.
    """
    if card is None:
        return Estimate(None, None, None, None)
    step = step_seconds(recipe, prediction, card)
    class_images = recipe.prior.num_class_images * len(recipe.class_recipes) if recipe.with_class_images else 0
    photos = 20  # an assumption, since a plan reads no photos
    rate = _flops_per_second(recipe, card)
    denoise, decode = (flops / rate for flops in prediction.picture_flops)
    denoise = max(denoise, prediction.copied_bytes[1] / HOST_LINK)
    seconds = START_UP + step * recipe.train.max_train_steps
    seconds += class_images * (denoise * recipe.prior.num_inference_steps + decode) / recipe.hardware.gpus
    if recipe.memory.cache_latents:
        seconds += (class_images + photos) * prediction.encode_flops / rate
    if recipe.validates and recipe.train.validate_every is not None:
        rounds = 1 + -(-recipe.train.max_train_steps // recipe.train.validate_every)
        held_out = sum(recipe.dataset.validation_count or (HELD_OUT_PHOTOS if subject.validation_dir else 0)
                       for subject in recipe.dataset.subjects)
        passes = max(VALIDATION_DRAWS * prediction.validation_flops / rate,
                     VALIDATION_DRAWS / recipe.train.train_batch_size * prediction.copied_bytes[1] / HOST_LINK)
        seconds += rounds * held_out * passes / recipe.hardware.gpus
    if recipe.sample.every is not None:
        rounds = 1 + -(-recipe.train.max_train_steps // recipe.sample.every)
        count = rounds * pictures_of_one_process(
            recipe, len(recipe.sample_prompts) * recipe.sample.images_per_prompt,
            max(recipe.sample.images_per_prompt, recipe.prior.sample_batch_size))
        seconds += count * (denoise * recipe.sample.num_inference_steps + decode)
    if recipe.evaluate.encoders:
        every = recipe.evaluate.every or recipe.train.max_train_steps
        rounds = 1 + -(-recipe.train.max_train_steps // every)
        subject, base = (len(texts) * recipe.evaluate.images_per_prompt
                         for texts in (recipe.evaluate_prompts, recipe.base_image_texts))
        of_class = recipe.evaluate.class_images * bool(recipe.class_prompt.strip())
        share = partial(pictures_of_one_process, recipe, batch=recipe.prior.sample_batch_size)
        count = rounds * (share(subject) + share(of_class)) + share(base)
        seconds += count * (denoise * recipe.sample.num_inference_steps + decode)

    saved_every = step * (recipe.checkpoint.every or recipe.train.max_train_steps)
    on_spot = seconds_with_interruptions(seconds, saved_every, START_UP, recipe.budget.interruptions_per_hour or 0.0)

    def price(per_hour: float | None, duration: float) -> float | None:
        return None if per_hour is None else duration / 3600 * per_hour

    return Estimate(step, seconds, price(recipe.hardware.price_usd_hour, seconds),
                    price(recipe.hardware.spot_price_usd_hour, on_spot), on_spot)


def pictures_of_one_process(recipe: Recipe, pictures: int, batch: int) -> int:
    """Return how many of `pictures` the process with the largest share generates: the GPUs take batches in turn."""
    rounds = -(-pictures // (batch * recipe.hardware.gpus))
    return min(pictures, rounds * batch)


def budgeted(recipe: Recipe, time: Estimate) -> tuple[float | None, float | None]:
    """Return the cost in US dollars and the hours of a run that count for its budget; None: unknown.

    They are those on a spot instance if budget.interruptions_per_hour is set.
    """
    on_spot = recipe.budget.interruptions_per_hour is not None
    seconds = time.spot_seconds if on_spot else time.run_seconds
    return time.spot_price_usd if on_spot else time.price_usd, None if seconds is None else seconds / 3600


def seconds_with_interruptions(seconds: float, saved_every: float, restart: float, per_hour: float) -> float:
    """Return the expected seconds of a run whose instance is taken away at random and replaced.

    The formula is that of Daly 2006 (Future Generation Computer Systems 22, 303-312) without the time of saving: with a
    mean time M between interruptions, M e^(restart / M) (e^(saved_every / M) - 1) / saved_every times as long. Work
    since the last checkpoint counts as lost. This is an upper bound: AWS announces an interruption two minutes before,
    in which most runs save. Waiting for another instance costs nothing and is not counted.

    Args:
        seconds: of the run without interruptions.
        saved_every: seconds between two checkpoints.
        restart: seconds from the start of another instance until training continues.
        per_hour: expected interruptions per hour.
    """
    if not per_hour:
        return seconds
    between = 3600 / per_hour
    interval = min(saved_every, seconds)
    growth = math.expm1(min(interval / between, 20.0))  # above 20, the run practically never ends
    return seconds * between / interval * math.exp(restart / between) * growth


def step_seconds(recipe: Recipe, prediction: Prediction, card: Card, flops: float = 1.0) -> float:
    """Estimate the seconds of one optimizer step.

    With n cards, gradients are summed by a ring all-reduce: each link carries 2 (n - 1) / n times the bytes of all
    gradients. The overlap of the all-reduce with the backward pass is not taken into account. With memory.fully_shard,
    each micro-batch gathers the weights twice and splits the gradients once, which sends (n - 1) / n times three.

    Args:
        flops: operations of the step, divided by those of a step in `prediction`.
    """
    cards, gradients = recipe.hardware.gpus, 4 * prediction.trained_parameters
    passes = 3 * recipe.micro_batches[1] if recipe.memory.fully_shard else 2
    all_reduce = passes * (cards - 1) / cards * gradients / (card.link_gb_s * 1e9)
    compute = flops * prediction.step_flops / _flops_per_second(recipe, card)
    compute = max(compute, prediction.copied_bytes[0] / HOST_LINK)  # a swapped block comes while others compute
    return compute + _weight_pass_seconds(recipe, prediction, card) + all_reduce + card.overhead_seconds


def _flops_per_second(recipe: Recipe, card: Card) -> float:
    """Return the operations per second that the run is assumed to reach."""
    return flops_per_second(card, recipe.precision.dtype is not Dtype.fp32, recipe.precision.tf32)


def flops_per_second(card: Card, half: bool, tf32: bool = False) -> float:
    """Return the operations per second that a card is assumed to reach in half precision, in TF32 or in fp32."""
    if tf32 and not half:  # half the rate of half precision on every card that has TF32
        return card.half_tflops / 2 * 1e12 * EFFICIENCY[True]
    return (card.half_tflops if half else card.fp32_tflops) * 1e12 * EFFICIENCY[half]


def _weight_pass_seconds(recipe: Recipe, prediction: Prediction, card: Card) -> float:
    """Estimate the seconds per step of the passes over all weights: casts, unscaling, norm, clipping, optimizer, EMA.

    Frozen weights are dequantised in the forward pass, in its recomputation and in the backward pass.

    The local variables count the bytes that are moved per trained parameter: `on_card` in the memory of the card,
    `on_host` in host memory, and `link` between the two.
    """
    memory = recipe.memory
    half = recipe.precision.dtype is not Dtype.fp32
    on_card = 12.0 * half * recipe.micro_batches[1]  # casts in both directions, forward and backward
    on_card += 8 * (recipe.precision.dtype is Dtype.fp16) + 4 + 8 * (recipe.train.max_grad_norm is not None)
    on_host = link = 0.0
    if memory.offload_optimizer:
        link, on_host = 8, STATE_PASSES[recipe.optimizer.kind]
    else:
        on_card += STATE_PASSES[recipe.optimizer.kind]
    if recipe.train.use_ema:
        if memory.offload_optimizer:
            on_host += 12 / memory.ema_every
        elif memory.ema_device is EmaDevice.cpu:
            link, on_host = link + 4 / memory.ema_every, on_host + 12 / memory.ema_every
        else:
            on_card += 12
    bandwidth = card.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE
    passes = (2 + memory.gradient_checkpointing) * recipe.micro_batches[1]
    frozen = recipe.method.low_rank * prediction.frozen_parameters * passes * DEQUANTISED[recipe.method.base_weights]
    return frozen / bandwidth + prediction.trained_parameters * (
        on_card / bandwidth + link / HOST_LINK + on_host / HOST_MEMORY)


def host_gib(recipe: Recipe, prediction: Prediction) -> float:
    """Return the GiB of host memory that a run needs: for its processes, for offloaded tensors, and for weights.

    Each process loads the base model, and has EMA and optimizer state of its own; with memory.fully_shard the processes
    have these together. Prompts are encoded, and checkpoints are collected, in one process of each machine.

    Trained weights are in host memory in fp32 while they are loaded or written. With an adapter, the weights of the
    base model are in host memory too: in the compute precision, or in fp32 if the adapter is merged at the end. Swapped
    blocks are among them. Text encoders that are released before the denoiser is loaded are in host memory alone.
    """
    method = recipe.method
    size = 2 if recipe.precision.dtype is not Dtype.fp32 else 4
    base = prediction.frozen_parameters * method.low_rank * (4 if method.merge else size)
    block = max(prediction.block_bytes, default=0)
    rounded = 1 << max(block - 1, 0).bit_length()  # PyTorch rounds pinned memory up to a power of two
    swapped = (recipe.memory.swap_blocks or 0) * (2 * block - rounded)  # blocks are in `host_bytes` and in `base`
    state = OPTIMIZER_STATE_BYTES[recipe.optimizer.kind] + 4 * recipe.train.use_ema
    collected = recipe.memory.fully_shard * state * prediction.trained_parameters  # while a checkpoint is written
    gpus = recipe.hardware.gpus
    loaded = gpus * (4 * prediction.trained_parameters + base)
    run = (prediction.host_bytes - swapped) * (1 if recipe.memory.fully_shard else gpus) + loaded + collected
    return gpus * PROCESS_GIB + max(run, prediction.encoder_bytes) / GIB


def disk_gib(recipe: Recipe, prediction: Prediction) -> float:
    """Return the GiB of disk that a run needs for checkpoints, the exported model and the base model.

    While a checkpoint is written, the disk contains one checkpoint more than `checkpoint.keep`.
    """
    trained = 4 * prediction.trained_parameters
    base = trained + 4 * prediction.frozen_parameters + prediction.encoder_bytes
    moments = max(2, OPTIMIZER_STATE_BYTES[recipe.optimizer.kind] / 4)
    checkpoint = trained * (1 + moments + recipe.train.use_ema)
    model = 2 * trained if recipe.method.low_rank and not recipe.method.merge else base
    return ((recipe.checkpoint.keep + 1) * checkpoint + model + base) / GIB
