"""How long and how much: a stated model over a prediction's operations and bytes. Nothing here was measured on a GPU.

    step = operations / (peak x efficiency) + passes over weights / bandwidth + host link + sum over cards + OVERHEAD

EFFICIENCY and OVERHEAD are fitted on the published T4 speeds of ShivamShrirao/diffusers' DreamBooth README (batch 1 and
2, with and without checkpointing, fp16 and fp32; read 2026-11). Other cards are given the same shares of their own
peaks. No torch.
"""

from dataclasses import dataclass

from dreambooth.config.enums import Dtype, EmaDevice, OptimizerKind
from dreambooth.config.recipe import Recipe
from dreambooth.planner.gpu_specs import Card
from dreambooth.planner.prediction import Prediction
from dreambooth.utils.hardware import GIB

EFFICIENCY = {True: 0.21, False: 0.42}  # share of the peak rate: with tensor cores (half), without (fp32)
OVERHEAD = 0.40  # seconds a step: launches and small operators
BANDWIDTH_SHARE = 0.75  # of the card's memory bandwidth that long passes reach: an assumption
HOST_LINK = 10e9  # bytes a second between card and host, PCIe 3 x16: an assumption
HOST_MEMORY = 15e9  # bytes a second that an optimizer on a few host cores passes: an assumption
START_UP = 120.0  # seconds of imports and loading from a local disk, an assumption; downloads come on top
PROCESS_GIB = 3.5  # host memory of Python, PyTorch and CUDA's libraries: an assumption

STATE_PASSES = {  # bytes an element that a step of the optimizer reads and writes, fp32 weight and gradient included
    OptimizerKind.adamw: 28, OptimizerKind.adamw8bit: 16, OptimizerKind.paged_adamw8bit: 16,
    OptimizerKind.adafactor: 24,
}


@dataclass(frozen=True)
class Estimate:
    """Seconds and US dollars; None where the card or its price is unknown."""

    step_seconds: float | None
    run_seconds: float | None
    price_usd: float | None
    spot_price_usd: float | None


def estimate(recipe: Recipe, prediction: Prediction, card: Card | None) -> Estimate:
    """Time and price of the whole run with class images, samples, evaluation's pictures and start-up; not scoring."""
    if card is None:
        return Estimate(None, None, None, None)
    step = step_seconds(recipe, prediction, card)
    pictures, photos = recipe.prior.num_class_images * len(recipe.classes) if recipe.with_prior else 0, 20
    drawing = _rate(recipe, card)
    denoise, decode = prediction.picture_flops
    seconds = START_UP + step * recipe.train.max_train_steps
    seconds += pictures * (denoise * recipe.prior.num_inference_steps + decode) / drawing / recipe.hardware.gpus
    if recipe.memory.cache_latents:
        seconds += (pictures + photos) * prediction.encode_flops / drawing
    if recipe.sample.every is not None:
        rounds = 1 + -(-recipe.train.max_train_steps // recipe.sample.every)
        count = rounds * len(recipe.sample_prompts) * recipe.sample.images_per_prompt
        seconds += count * (denoise * recipe.sample.num_inference_steps + decode) / drawing
    if recipe.evaluate.encoders:
        every = recipe.evaluate.every or recipe.train.max_train_steps
        rounds = 1 + -(-recipe.train.max_train_steps // every)
        count = rounds * (len(recipe.evaluate_prompts) * recipe.evaluate.images_per_prompt
                          + recipe.evaluate.class_images * bool(recipe.class_prompt.strip()))
        seconds += count * (denoise * recipe.sample.num_inference_steps + decode) / drawing

    def price(an_hour: float | None) -> float | None:
        return None if an_hour is None else seconds / 3600 * an_hour

    return Estimate(step, seconds, price(recipe.hardware.price_usd_hour), price(recipe.hardware.spot_price_usd_hour))


def step_seconds(recipe: Recipe, prediction: Prediction, card: Card, flops: float = 1.0) -> float:
    """One optimizer step, of `flops` times the operations that were counted. The gradients of several cards are summed
    in a ring, 2 (n - 1) / n of them over each link; that it overlaps with the backward pass is not counted."""
    ring = 2 * (recipe.hardware.gpus - 1) / recipe.hardware.gpus * 4 * prediction.trained / (card.link_gb_s * 1e9)
    return flops * prediction.step_flops / _rate(recipe, card) + _passes(recipe, prediction, card) + ring + OVERHEAD


def _rate(recipe: Recipe, card: Card) -> float:
    half = recipe.precision.dtype is not Dtype.fp32
    if recipe.precision.tf32 and not half:  # TF32 has half the rate of half precision on every card that has it
        return card.half_tflops / 2 * 1e12 * EFFICIENCY[True]
    return (card.half_tflops if half else card.fp32_tflops) * 1e12 * EFFICIENCY[half]


def _passes(recipe: Recipe, prediction: Prediction, card: Card) -> float:
    """Seconds for what is done once a weight and step: casts, unscaling, norm, clipping, optimizer, EMA."""
    memory, weights = recipe.memory, prediction.trained
    half = recipe.precision.dtype is not Dtype.fp32
    on_card = 12.0 * half * recipe.train.gradient_accumulation_steps  # cast each way, forward and backward
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
    on_card /= card.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE
    return weights * (on_card + link / HOST_LINK + on_host / HOST_MEMORY)


def host_gib(recipe: Recipe, prediction: Prediction) -> float:
    """Host memory: the process, what the card has given away, and the trained weights in fp32 while they are loaded or
    written; with an adapter the base's, read in the compute precision, or in fp32 where it is merged."""
    method = recipe.method
    half = recipe.precision.dtype is not Dtype.fp32 and not method.merge
    base = prediction.frozen * method.low_rank * (2 if half else 4)
    return PROCESS_GIB + (prediction.host + 4 * prediction.trained + base) / GIB


def disk_gib(recipe: Recipe, prediction: Prediction) -> float:
    """Disk: checkpoints (one more than kept while one is written), the exported model, the base."""
    trained, every = 4 * prediction.trained, 4 * (prediction.trained + prediction.frozen)
    a_checkpoint = trained * (3 + recipe.train.use_ema)
    model = 2 * trained if recipe.method.low_rank and not recipe.method.merge else every
    return ((recipe.checkpoint.keep + 1) * a_checkpoint + model + every) / GIB
