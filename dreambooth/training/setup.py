"""Prepares a run before its first step: photos, base model, class images, caches, batches and training state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dreambooth.config.enums import EmaDevice, LatentCache
from dreambooth.config.method import has_word
from dreambooth.config.recipe import Recipe
from dreambooth.data import class_images, latent_cache, photo_report, subjects
from dreambooth.data.batches import Batches, Latents, encode_batch_size
from dreambooth.data.index import records
from dreambooth.data.index.photo_loader import PhotoLoader
from dreambooth.data.photo_set import PhotoSet
from dreambooth.data.photos import Load, Photo, load_photos
from dreambooth.data.step_shares import StepShares
from dreambooth.errors import UserError
from dreambooth.evaluation.evaluator import Scorer
from dreambooth.models import loading, lora, prompt_encodings
from dreambooth.models.new_tokens import training as new_tokens
from dreambooth.models.new_tokens.attach import attach as attach_new_tokens
from dreambooth.models.pipeline import build_pipeline, generate_images
from dreambooth.optim import memory_levers
from dreambooth.optim.ema import Ema
from dreambooth.optim.optimizers import build_lr_scheduler, optimizer_factory
from dreambooth.optim.streaming_optimizer import StreamingOptimizer
from dreambooth.runs import run_folder
from dreambooth.runtime import oom_advice
from dreambooth.runtime.engine import Engine, create_engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.runtime.module_offload import ModuleOffload
from dreambooth.serialization import export
from dreambooth.training import best_weights, checkpoint, output_preservation
from dreambooth.training.parameter_groups import parameter_groups
from dreambooth.training.step import Objective, TrainState
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console
from dreambooth.utils.plurals import counted

if TYPE_CHECKING:
    from dreambooth.optim.fully_shard import FullyShardedModel


@dataclass
class Setup:
    """The objects of a run that is ready to train."""

    parts: loading.Components
    photos: list[Photo]
    batches: Batches
    objective: Objective
    state: TrainState
    trained: nn.Module  # the TrainedModel itself, without wrappers
    pipeline: Any  # a diffusers pipeline of `parts`, so training changes its weights
    scorer: Scorer | None  # for evaluation; None: no evaluation, or not the main process
    idle: ModuleOffload  # the model parts that a training step does not use
    held_out: PhotoSet | None = None  # photos that do not train, on which the loss is measured; None: it is not


def assemble(recipe: Recipe, engine: Engine, accelerator: Accelerator, console: Console, meter: MemoryMeter) -> Setup:
    """Load all inputs of a run and build its objects.

    Photos are checked before the model is loaded, so that errors in photos are reported early.

    Raises:
        UserError: a photo, a prompt or the base model cannot be used with the recipe, or the number of processes does
            not fit the recipe (`_check_processes`).
    """
    _check_processes(recipe, engine)
    engine.set_autocast_cache(recipe.memory.autocast_cache)
    on_disk = recipe.memory.cache_latents and recipe.memory.latent_cache is LatentCache.disk
    load = PhotoLoader(recipe.run_root, saved=on_disk, writes=engine.local_rank == 0)
    scorer = Scorer(recipe, load) if recipe.evaluate.encoders and engine.is_main_process else None
    with meter.phase("load"):
        photos, repeats = subjects.load_subject_photos(recipe, load)
        held_out = subjects.load_held_out_photos(recipe, photos, load)
        if engine.is_main_process:
            remove_shared_leftovers(recipe.run_root)
            console.say(photo_report.describe_photos(recipe, photos))
        _encode_prompts(recipe, engine, lambda: _prompts(recipe, photos + held_out).union(
            *map(class_images.captions, recipe.class_recipes if recipe.with_class_images else ())))
        parts = loading.load(recipe, engine.device)
        attach_new_tokens(parts, recipe)
    _check_prompts(parts, recipe, photos, held_out)
    pipeline = build_pipeline(parts)
    photo_sets = [_build_photo_set(recipe, "instance", photos, repeats)]
    if recipe.with_class_images:
        with meter.phase("class_images"):
            photo_sets.append(_build_photo_set(recipe, "class", [
                photo for class_recipe in recipe.class_recipes
                for photo in _load_class_images(class_recipe, pipeline, engine, console, load)]))
    if recipe.dataset.buckets:
        console.say(subjects.describe_buckets(photos))
    validation_set = PhotoSet("validation", held_out, True, False) if held_out and recipe.validates else None
    encoded = photo_sets + ([validation_set] if validation_set else [])
    with meter.phase("caching"), ModuleOffload([parts.denoiser], engine.device).on_host():
        latents = _build_latents(recipe, parts, encoded, console)
        encode_prompt = _build_prompt_encoder(recipe, parts, encoded)
        idle = _build_idle(recipe, parts, engine)
        idle.to_host()
    schedule = parts.noise_schedule(recipe)
    batches = Batches(
        photo_sets=photo_sets, latents=latents, encode_prompt=encode_prompt,
        latent_shape=_latent_shape(recipe, parts), num_timesteps=schedule.length,
        seed=recipe.train.seed, batch_size=recipe.train.train_batch_size,
        accumulation=recipe.train.gradient_accumulation_steps, device=engine.device,
        rank=engine.rank, world_size=engine.world_size, noise_offset=recipe.train.noise_offset,
        multires_noise=recipe.train.multires_noise,
        with_size_and_crop=parts.family.uses_size_and_crop,
        global_batch_size=recipe.train.global_batch_size,
        share_prompts=not recipe.method.dropout)  # with dropout, each row drops different elements
    with meter.phase("state"):
        model = loading.prepare(parts, recipe)
        for line in lora.describe(model, recipe.method) if recipe.method.low_rank else ():
            console.say(line)
        sharded = _shard(model, engine) if recipe.memory.fully_shard else None
        state = _build_state(recipe, model, accelerator, parts.new_tokens, batches.shares.samples_per_step, sharded)
    class_texts = [encode_prompt(one.class_prompt) for one in recipe.class_recipes] if recipe.preserves_output else []
    objective = Objective.of(recipe, schedule, output_preservation.build(
        recipe, model, schedule, class_texts, batches.latent_shape, engine, parts.family.uses_size_and_crop))
    return Setup(parts, photos, batches, objective, state, model, pipeline, scorer, idle, validation_set)


def restore(setup: Setup, start: Path | None, recipe: Recipe, engine: Engine, console: Console,
            meter: MemoryMeter) -> None:
    """Load the checkpoint `start` into the training state; None: the run starts at step 0. Then check the disk space.

    Raises:
        UserError: `start` cannot be loaded, and checkpoint.resume is not auto or no earlier checkpoint can be loaded.
        DoesNotFit: the disk has too little space for the run's checkpoints, best weights and exported model.
    """
    if start:
        with meter.phase("resume"):
            start = checkpoint.restore_newest(start, setup.state, setup.trained, engine, recipe.checkpoint.resume)
        console.say(f"resuming after step {setup.state.step} from {start.name}")
    if engine.is_main_process:
        best = best_weights.needed_bytes(setup.trained) if recipe.evaluate.select else 0
        checkpoints = checkpoint.needed_bytes(setup.state, setup.trained, recipe.checkpoint.keep)
        run_folder.check_disk_space(recipe.run_dir, checkpoints + best + export.size_bytes(setup.parts, recipe))


def make_class_images(recipe: Recipe) -> None:
    """Generate the missing class images of a run, and do nothing else.

    The base model is loaded only if class images are missing.
    """
    console = Console()
    if not recipe.with_class_images:
        reason = "prior.kind=output needs none" if recipe.with_prior else "prior preservation is off"
        console.say(f"no class images: {reason}")
        return
    remove_shared_leftovers(recipe.run_root)
    incomplete = []
    for class_recipe in recipe.class_recipes:
        images = class_images.find(class_recipe)
        if images.missing:
            incomplete.append(class_recipe)
        else:
            console.say(f"{images} in {images.folder}")
    if not incomplete:
        return
    atomic_files.check_writable(recipe.run_root, "type run_root=DIR, a folder that you can write to")
    loading.import_libraries()
    engine, _ = create_engine(recipe.device, recipe.precision.dtype, recipe.precision.tf32)
    engine.set_autocast_cache(recipe.memory.autocast_cache)
    recipe_of_all = recipe.with_processes(engine.world_size)
    meter = MemoryMeter(engine.device, partial(oom_advice.suggest_overrides, recipe=recipe_of_all))
    with meter.phase("load"):
        _encode_prompts(recipe, engine, lambda: {one.class_prompt for one in incomplete})
        pipeline = build_pipeline(loading.load(recipe, engine.device))
    with meter.phase("class_images"):
        for class_recipe in incomplete:
            _load_class_images(class_recipe, pipeline, engine, console, PhotoLoader(recipe.run_root))


def remove_shared_leftovers(run_root: Path) -> None:
    """Remove old temporary files that killed processes left in the folders that the runs of a run_root share."""
    shared = (folder for name in ("class_images", "base_images") for folder in (run_root / name).glob("*/"))
    for folder in (run_root / "latents", run_root / prompt_encodings.FOLDER, run_root / records.FOLDER, *shared):
        atomic_files.remove_leftovers(folder, atomic_files.SHARED_LEFTOVER_AGE)


def _check_processes(recipe: Recipe, engine: Engine) -> None:
    """Check that the number of processes fits the number of GPUs and the recipe's memory settings.

    A machine with several GPUs is paid for as a whole, so training on only some of its GPUs is an error. Several
    processes average their gradients after the backward pass. The settings memory.optimizer_in_backward and
    memory.offload_optimizer use and release each gradient during the backward pass, so they work in one process only.
    With memory.swap_blocks, frozen weights are on two devices, which data parallelism does not support.

    Raises:
        UserError: the host has fewer processes than hardware.gpus, a step has fewer photos than there are processes,
            or there are several processes although one of the three memory settings is on.
    """
    gpus, photos = recipe.hardware.gpus, recipe.train.global_batch_size
    if photos is not None and photos < engine.world_size:
        raise UserError(f"train.global_batch_size={photos} leaves some of the {engine.world_size} processes without a "
                        f"photo: type train.global_batch_size={engine.world_size}, or start at most "
                        f"{counted(photos, 'process', 'processes')}")
    if engine.device.type == "cuda" and engine.local_world_size < gpus:
        raise UserError(f"hardware.gpus={gpus}, but only {engine.local_world_size} of them would train: type torchrun "
                        f"--standalone --nproc-per-node={gpus} -m dreambooth.train ..., or "
                        f"hardware.gpus={engine.local_world_size}")
    for lever in ("optimizer_in_backward", "offload_optimizer"):
        if engine.world_size > 1 and getattr(recipe.memory, lever):
            raise UserError(f"memory.{lever}=true works in one process: type memory.{lever}=false, or start without "
                            "torchrun")
    if recipe.memory.fully_shard:
        _check_sharding(engine, recipe)
    if engine.world_size > 1 and recipe.memory.swap_blocks:
        raise UserError("memory.swap_blocks works in one process: type memory.swap_blocks=null, or start without "
                        "torchrun")


def _check_sharding(engine: Engine, recipe: Recipe) -> None:
    """Check that there are several processes, and that all of them have the same number of micro-batches.

    Raises:
        UserError: they do not.
    """
    train = recipe.train
    if engine.world_size == 1:
        raise UserError("memory.fully_shard=true splits the weights over several processes: start with torchrun, or "
                        "type memory.fully_shard=false")
    shares = [StepShares(train.train_batch_size, train.gradient_accumulation_steps, rank, engine.world_size,
                         train.global_batch_size) for rank in range(engine.world_size)]
    if len({len(share.micro_batches) for share in shares}) > 1:
        raise UserError(f"train.global_batch_size={train.global_batch_size} gives the {engine.world_size} processes "
                        "different numbers of micro-batches, and memory.fully_shard=true needs the same: type "
                        "train.train_batch_size=2, or another train.global_batch_size")


def _prompts(recipe: Recipe, photos: list[Photo]) -> set[str]:
    """Return every prompt that the run uses, except captions of the user's own class images."""
    return recipe.picture_prompts | {photo.caption for photo in photos}


def _encode_prompts(recipe: Recipe, engine: Engine, prompts: Callable[[], set[str]]) -> None:
    """Encode and store prompts, see `loading.encode_prompts`, in one process of each host. The others wait for it."""
    if engine.local_rank == 0:
        loading.encode_prompts(recipe, engine.device, prompts)
    engine.barrier()


def _check_prompts(parts: loading.Components, recipe: Recipe, photos: list[Photo],
                   held_out: Sequence[Photo] = ()) -> None:
    """Check every prompt that the run uses by tokenizing it.

    Args:
        photos: the photos that train.
        held_out: the photos that do not train.

    Raises:
        UserError: a prompt is too long, or no caption that trains has the word that new tokens replace.
    """
    for word in recipe.trigger_words:
        if not any(has_word(photo.caption, word) for photo in photos):
            raise UserError(f"no caption of the photos has the word {word}, so that its {recipe.method.new_tokens} new "
                            "tokens would not be trained: write it into the captions, or type method.new_tokens=0")
    for prompt in sorted(_prompts(recipe, [*photos, *held_out])):
        parts.tokens(prompt)


def _build_photo_set(recipe: Recipe, name: str, photos: list[Photo], repeats: list[int] | None = None) -> PhotoSet:
    data = recipe.dataset
    return PhotoSet(name, photos, data.center_crop, data.random_flip, repeats, data.prompt_dropout)


def _load_class_images(recipe: Recipe, pipeline: Any, engine: Engine, console: Console, load: Load) -> list[Photo]:
    """Return the class images of a recipe. Missing images are generated first."""
    images = class_images.find(recipe)
    console.say(str(images))

    def generate(seeds: list[int]) -> list[Any]:
        prompts = [recipe.class_prompt] * len(seeds)
        batches = generate_images(
            pipeline, prompts, seeds, class_images.sampler_settings(recipe), len(seeds), engine.autocast)
        return next(batches)

    if images.missing:
        with console.bar("class images", len(images.missing)) as bar:
            # The processes of a host share the work. Hosts do not, because each has its own disk.
            class_images.generate_missing(
                images, recipe, generate, bar.tick, engine.local_rank, engine.local_world_size)
    engine.barrier()
    return load_photos(images.paths, recipe.class_prompt, recipe.model.resolution, recipe.dataset.buckets,
                       load=load)


def _build_latents(recipe: Recipe, parts: loading.Components, photo_sets: list[PhotoSet], console: Console) -> Latents:
    store = None
    if recipe.memory.cache_latents:
        store = latent_cache.LatentStore(recipe.memory.latent_cache, parts.vae.device, recipe.run_root / "latents",
                                         latent_cache.digest(parts.vae))
    latents = Latents(parts.encode, recipe.model.resolution, parts.scaling_factor, store)
    if recipe.memory.cache_latents:
        size, largest = (encode_batch_size(latents.resolution, device) for device in (parts.vae.device.type, "cuda"))
        total = sum(len(photo_set.photos) * (1 + photo_set.random_flip) for photo_set in photo_sets)
        with console.bar("encoding", total) as bar:
            for photo_set in photo_sets:
                latents.fill(photo_set, bar.tick, size, largest)
    return latents


def _build_prompt_encoder(recipe: Recipe, parts: loading.Components, photo_sets: list[PhotoSet]) -> Any:
    """Build a function that converts a prompt to token ids if each step encodes them, and else to hidden states.

    Token ids are computed once per prompt. Hidden states are computed once per prompt if memory.cache_text is on, and
    otherwise in every call.
    """
    encode = parts.tokens if recipe.encodes_in_step else parts.frozen_text
    if not (recipe.memory.cache_text or recipe.encodes_in_step):
        return encode
    empty_prompt = [""] * (recipe.dataset.prompt_dropout > 0)
    captions = {p.caption: p.caption for photo_set in photo_sets for p in photo_set.photos}
    if recipe.preserves_output:
        captions |= {one.class_prompt: one.class_prompt for one in recipe.class_recipes}
    cache: dict[str, Tensor] = {prompt: encode(prompt) for prompt in (*captions, *empty_prompt)}
    return cache.__getitem__


def _build_idle(recipe: Recipe, parts: loading.Components, engine: Engine) -> ModuleOffload:
    return ModuleOffload(loading.idle_modules(parts, recipe), engine.device)


def _latent_shape(recipe: Recipe, parts: loading.Components) -> tuple[int, int, int]:
    side = recipe.model.resolution // parts.vae_scale
    return parts.latent_channels, side, side


def _shard(model: loading.TrainedModel, engine: Engine) -> "FullyShardedModel":
    from dreambooth.optim.fully_shard import FullyShardedModel  # imports much of PyTorch that other runs do not need

    return FullyShardedModel(model, engine)


def _build_state(recipe: Recipe, model: loading.TrainedModel, accelerator: Accelerator,
                 tokens: new_tokens.NewTokens | None, samples_per_step: int,
                 sharded: "FullyShardedModel | None") -> TrainState:
    trained: Any = model if sharded is None else sharded.module
    optimizer = memory_levers.build_training_optimizer(
        trained, optimizer_factory(recipe.optimizer, recipe.train.learning_rate), recipe.memory,
        loading.TORCH_DTYPE[recipe.precision.dtype], recipe.train.seed, parameter_groups(trained, recipe))
    ema = None
    if recipe.train.use_ema:
        device = torch.device("cpu") if recipe.memory.ema_device is EmaDevice.cpu else None
        weights: Any = optimizer.weights() if isinstance(optimizer, StreamingOptimizer) else model
        if sharded is not None:
            weights = sharded.weights()
        ema = Ema(weights, recipe.train.ema_decay, device, recipe.memory.ema_every)
    wrapped: nn.Module = accelerator.prepare_model(model) if sharded is None else sharded.module
    if recipe.train.compile:
        model.compile(dynamic=False)  # in place; the pipeline calls the model's parts, which are not compiled
    scheduler = build_lr_scheduler(optimizer, recipe.train)
    if tokens is not None:
        tokens.stop_in(scheduler)
    return TrainState(wrapped, optimizer, scheduler, ema, samples_per_step=samples_per_step, sharded=sharded,
                      after_step=tokens.after_step if tokens else None)
