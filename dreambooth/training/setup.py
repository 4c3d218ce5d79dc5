"""Assembles a run: base model, class images, photos, batches, state. Each part is made by its own module."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dreambooth.config.enums import EmaDevice
from dreambooth.config.recipe import Recipe
from dreambooth.data import class_images, subjects
from dreambooth.data import latent_cache as kept
from dreambooth.data.batches import Batches, PhotoSet, Latents
from dreambooth.data.photos import Photo, load_photos
from dreambooth.errors import UserError
from dreambooth.evaluation.evaluator import Judge
from dreambooth.models import loading
from dreambooth.models.pipeline import build_pipeline, generate_images
from dreambooth.optim import memory_levers
from dreambooth.optim.ema import Ema
from dreambooth.optim.optimizers import build_schedule, optimizer_factory
from dreambooth.optim.streaming_optimizer import StreamingOptimizer
from dreambooth.runtime import oom_advice
from dreambooth.runtime.engine import Engine, create_engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.runtime.module_offload import ModuleOffload
from dreambooth.training.step import Objective, TrainState
from dreambooth.utils.console import Console
from dreambooth.utils.signals import StopRequest


@dataclass
class Setup:
    """A run that is ready to train."""

    parts: loading.Components
    photos: list[Photo]
    batches: Batches
    objective: Objective
    state: TrainState
    trained: nn.Module  # the Denoiser itself, never a wrapper
    pipeline: Any  # over the live parts
    judge: Judge | None  # of evaluation, in the first process; None: no evaluation
    idle: ModuleOffload  # parts that the step does not use


def assemble(recipe: Recipe, engine: Engine, accelerator: Accelerator, console: Console, meter: MemoryMeter,
             stop: StopRequest) -> Setup:
    """Load and build everything; what is wrong with photos is said before the model is loaded."""
    _check_processes(recipe, engine)
    engine.set_autocast_cache(recipe.memory.autocast_cache)
    judge = Judge(recipe) if recipe.evaluate.encoders and engine.is_main_process else None
    with meter.phase("load"):
        photos, repeats = subjects.load_subject_photos(recipe)
        parts = loading.load(recipe, engine.device)
    _check_prompts(parts, recipe, photos)
    pipeline = build_pipeline(parts)
    concepts = [_concept(recipe, "instance", photos, repeats)]
    if recipe.with_prior:
        with meter.phase("class_images"):
            concepts.append(_concept(recipe, "class", [
                photo for one in recipe.class_recipes for photo in _class_images(one, pipeline, engine, console, stop)]))
    if recipe.dataset.buckets:
        console.say(subjects.describe_buckets(photos))
    with meter.phase("caching"), ModuleOffload([parts.unet], engine.device).on_host():
        latents = _latents(recipe, parts, concepts, console)
        text = _text(recipe, parts, concepts)
        idle = _idle(recipe, parts, engine)
        idle.to_host()
    schedule = parts.noise_schedule()
    batches = Batches(
        concepts=concepts, latents=latents, text=text,
        latent_shape=_latent_shape(recipe, parts), timesteps=schedule.length,
        seed=recipe.train.seed, batch_size=recipe.train.train_batch_size,
        accumulation=recipe.train.gradient_accumulation_steps, device=engine.device,
        rank=engine.rank, world=engine.world_size, noise_offset=recipe.train.noise_offset,
        prompts_once=not recipe.method.dropout)  # each row has a dropout of its own
    objective = Objective(schedule, recipe.prior.prior_loss_weight, recipe.train.snr_gamma,
                          recipe.two_passes)
    with meter.phase("state"):
        denoiser = loading.prepare(parts, recipe)
        state = _state(recipe, denoiser, accelerator)
    return Setup(parts, photos, batches, objective, state, denoiser, pipeline, judge, idle)


def class_images_alone(recipe: Recipe, stop: StopRequest) -> None:
    """Make the class images that a run will look for and nothing else; the base is not loaded if none is missing."""
    console = Console()
    if not recipe.with_prior:
        console.say("no class images: prior preservation is off")
        return
    lacking = []
    for one in recipe.class_recipes:
        images = class_images.find(one)
        if images.missing:
            lacking.append(one)
        else:
            console.say(f"{images} in {images.folder}")
    if not lacking:
        return
    loading.import_libraries()
    engine, _ = create_engine(recipe.device, recipe.precision.dtype, recipe.precision.tf32)
    engine.set_autocast_cache(recipe.memory.autocast_cache)
    meter = MemoryMeter(engine.device, partial(oom_advice.suggest_overrides, recipe=recipe.with_processes(engine.world_size)))
    with meter.phase("load"):
        pipeline = build_pipeline(loading.load(recipe, engine.device))
    with meter.phase("class_images"):
        for one in lacking:
            _class_images(one, pipeline, engine, console, stop)


def _check_processes(recipe: Recipe, engine: Engine) -> None:
    """Data parallel averages gradients after a backward pass; these levers have used them by then.

    A machine of several cards is paid for whole: one that would train on fewer says so.
    """
    spec, gpus = recipe.memory, recipe.hardware.gpus
    if engine.device.type == "cuda" and engine.local_world_size < gpus:
        raise UserError(f"hardware.gpus={gpus}, and {engine.local_world_size} of them would train: type torchrun "
                        f"--standalone --nproc-per-node={gpus} -m dreambooth.train ..., or "
                        f"hardware.gpus={engine.local_world_size}")
    for lever in ("optimizer_in_backward", "offload_optimizer"):
        if engine.world_size > 1 and getattr(spec, lever):
            raise UserError(f"memory.{lever}=true works in one process: type memory.{lever}=false, or start without "
                            "torchrun")


def _check_prompts(parts: loading.Components, recipe: Recipe, photos: list[Photo]) -> None:
    captions = {photo.caption for photo in photos}
    for prompt in sorted(captions | set(recipe.sample_prompts) | {one.class_prompt for one in recipe.class_recipes}
                         | set(recipe.evaluate_prompts if recipe.evaluate.encoders else ())):
        parts.tokens(prompt)


def _concept(recipe: Recipe, stream: str, photos: list[Photo], repeats: list[int] | None = None) -> PhotoSet:
    data = recipe.dataset
    return PhotoSet(stream, photos, data.center_crop, data.random_flip, repeats, data.prompt_dropout)


def _class_images(recipe: Recipe, pipeline: Any, engine: Engine, console: Console, stop: StopRequest) -> list[Photo]:
    images = class_images.find(recipe)
    console.say(str(images))

    def generate(seeds: list[int]) -> list[Any]:
        stop.check()
        prompts = [recipe.class_prompt] * len(seeds)
        batches = generate_images(
            pipeline, prompts, seeds, class_images.sampler_settings(recipe), len(seeds), engine.autocast)
        return next(batches)

    if images.missing:
        with console.bar("class images", len(images.missing)) as bar:
            # Shared by the processes of a host, not by hosts: each has a disk of its own.
            class_images.generate_missing(images, recipe, generate, bar.tick, engine.local_rank, engine.local_world_size)
    engine.barrier()
    return load_photos(images.paths, recipe.class_prompt, recipe.model.resolution, recipe.dataset.buckets)


def _latents(recipe: Recipe, parts: loading.Components, concepts: list[PhotoSet], console: Console) -> Latents:
    keep = None
    if recipe.memory.cache_latents:
        keep = kept.LatentStore(recipe.memory.latent_cache, parts.vae.device, recipe.run_root / "latents",
                         kept.digest(parts.vae))
    latents = Latents(parts.encode, recipe.model.resolution, parts.scaling_factor, keep)
    if recipe.memory.cache_latents:
        flips = 2 if recipe.dataset.random_flip else 1
        with console.bar("encoding", flips * sum(len(concept.photos) for concept in concepts)) as bar:
            for concept in concepts:
                latents.fill(concept, bar.tick)
    return latents


def _text(recipe: Recipe, parts: loading.Components, concepts: list[PhotoSet]) -> Any:
    """prompt -> ids while the text encoder trains, hidden states otherwise; each prompt once if that is cached."""
    encode = parts.tokens if recipe.train.train_text_encoder else parts.hidden_states
    if not (recipe.memory.cache_text or recipe.train.train_text_encoder):
        return encode
    untold = [""] * (recipe.dataset.prompt_dropout > 0)
    captions = {p.caption: p.caption for concept in concepts for p in concept.photos}
    known: dict[str, Tensor] = {prompt: encode(prompt) for prompt in (*captions, *untold)}
    return known.__getitem__


def _idle(recipe: Recipe, parts: loading.Components, engine: Engine) -> ModuleOffload:
    text_rests = recipe.memory.cache_text and not recipe.train.train_text_encoder
    return ModuleOffload([parts.vae] * recipe.memory.cache_latents + parts.encoders * text_rests, engine.device)


def _latent_shape(recipe: Recipe, parts: loading.Components) -> tuple[int, int, int]:
    side = recipe.model.resolution // parts.vae_scale
    return parts.latent_channels, side, side


def _state(recipe: Recipe, denoiser: loading.Denoiser, accelerator: Accelerator) -> TrainState:
    optimizer = memory_levers.build_training_optimizer(denoiser, optimizer_factory(recipe.optimizer, recipe.train.learning_rate), recipe.memory,
                             loading.TORCH_DTYPE[recipe.precision.dtype], recipe.train.seed)
    ema = None
    if recipe.train.use_ema:
        device = torch.device("cpu") if recipe.memory.ema_device is EmaDevice.cpu else None
        weights = optimizer.weights() if isinstance(optimizer, StreamingOptimizer) else denoiser
        ema = Ema(weights, recipe.train.ema_decay, device, recipe.memory.ema_every)
    wrapped: nn.Module = accelerator.prepare_model(denoiser)
    if recipe.train.compile:
        denoiser.compile(dynamic=False)  # in place: the pipeline calls the parts, which stay as they are
    return TrainState(wrapped, optimizer, build_schedule(optimizer, recipe.train), ema)
