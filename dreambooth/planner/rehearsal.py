"""Predicts the memory of a run by rehearsing it on tensors without data, with the run's own recipe and training step.

A StorageTrace records all allocations while the phases of the run are rehearsed in this order:

    skeleton model -> prompts -> class images -> caching -> train_step -> validation -> samples -> evaluation

The phase `prompts` exists only if the run releases its text encoders before it loads the denoiser. A model of the
allocator then computes the memory by phase and category from the recorded events.

Nothing is computed and nothing is downloaded. These parts are modelled instead of run: the optimizer
(optimizer_memory.py), the allocator (caching_allocator.py), the workspaces of attention kernels (fake_cuda.py) and the
encoders of the evaluation (a table). docs/planner.md compares predictions with published figures.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import AttentionKind, Dtype, EmaDevice, Weights
from dreambooth.config.evaluate import Evaluate
from dreambooth.config.recipe import Recipe
from dreambooth.data.aspect_buckets import Size, largest_bucket
from dreambooth.data.batches import Batch, encode_batch_size, join_batches
from dreambooth.models import loading, text_encoders
from dreambooth.models.block_swap import BlockSwap
from dreambooth.optim.cpu_offload import OffloadedOptimizer
from dreambooth.optim.memory_levers import build_training_optimizer
from dreambooth.optim.sharded_blocks import gathered_bytes
from dreambooth.planner import skeleton_models
from dreambooth.planner.allocation_trace import ACTIVATIONS, HOST, TEMPORARIES, StorageTrace
from dreambooth.planner.caching_allocator import MIB
from dreambooth.planner.fake_cuda import (
    attention_workspace_bytes,
    fake_gpu,
    fake_tensors,
    offload_weights,
    reload_weights,
)
from dreambooth.planner.optimizer_memory import ModelledOptimizer
from dreambooth.planner.phase_markers import FakeGradScaler, PhaseMarkingEma, PhaseMarkingEngine, make_gradient_hook
from dreambooth.planner.prediction import Prediction
from dreambooth.planner.trace_replay import split_over_processes
from dreambooth.runtime.engine import Engine
from dreambooth.training import output_preservation
from dreambooth.training.output_preservation import OutputPreservation
from dreambooth.training.parameter_groups import parameter_groups
from dreambooth.training.step import Objective, TrainState, train_step
from dreambooth.training.validation import DRAWS

CUBLAS_WORKSPACE = 8 * MIB + 128 * 1024  # 8320 KiB: PyTorch's default :4096:2:16:8
# Bytes of the weights of the evaluation's encoders in fp32, and the measured peak memory of EfficientNet-Lite0's
# activations for a batch of its images. The other encoders need less, which a test verifies. A plan loads no encoder.
ENCODER_WEIGHTS = {"efficientnet_lite0": 14 * MIB, "dino": 84 * MIB, "clip": 578 * MIB, "lpips": 10 * MIB}
ENCODER_ACTIVATIONS = 96 * MIB
ENCODER_BATCH = 16  # images (evaluation/encoders.py)


def predict(recipe: Recipe) -> Prediction:
    """Predict the memory and the operations of a run.

    Raises:
        UserError: the architecture of the base model is unknown.
    """
    cuda = recipe.device == "cuda"
    with fake_gpu(recipe.hardware.compute_capability) if cuda else fake_tensors():
        return rehearse(recipe)


def rehearse(recipe: Recipe) -> Prediction:
    """Rehearse a run and return its prediction.

    Inside `fake_tensors` or `fake_gpu`, tensors have no data. Outside them, real tensors are used, which is slow.
    """
    return _Rehearsal(recipe).prediction()


def _count_weights(parameter: nn.Parameter) -> int:
    """Return the number of weights of a parameter. bitsandbytes packs two weights of 4 bits in one element."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


class _Rehearsal:
    """Rehearses the phases of a training run in order, and records them in a StorageTrace."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.memory = recipe.memory
        self.trace = StorageTrace(attention_workspace_bytes)
        self.parts = skeleton_models.build_skeleton(recipe)
        self.encoders = self.parts.encoders
        self.encodes_ahead = text_encoders.encodes_ahead(self.parts.family, recipe)
        if self.encodes_ahead:
            self.parts.encoders = []
        self.objective = Objective.of(recipe, self.parts.noise_schedule(recipe))
        self.autocast = self._autocast()
        self.engine = self._engine()
        # The last recorded sampling: (batch size, guidance scale), and the start and end of its range of events.
        self.sampled: tuple[tuple[int, float], int, int] | None = None
        self.picture_flops, self.encode_flops = (0, 0), 0
        self.validation_flops = 0
        self.copied_bytes = (0, 0)  # by block swap: in a step, and in a denoising step of one picture

    def prediction(self) -> Prediction:
        """Rehearse all phases, and return the prediction."""
        trace, recipe, parts = self.trace, self.recipe, self.parts
        with trace:
            trace.mark("load")
            workspaces = torch.empty(CUBLAS_WORKSPACE if recipe.device == "cuda" else 0, dtype=torch.uint8)
            trace.add([workspaces], "workspace")
            encoder_bytes = self._encode_prompts() if self.encodes_ahead else 0
            block_bytes = self._swap_blocks()
            for module in parts.modules:
                self._add_weights(module)
            if recipe.with_class_images and recipe.prior.num_class_images:
                self._sample("class_images", recipe.prior.sample_batch_size, recipe.prior.guidance_scale)
            swapped = [] if parts.swap is None else [tensor for host in parts.swap.hosts for tensor in host.tensors]
            shapes = offload_weights(parts.denoiser, swapped)
            with trace.phase("caching"):
                self._cache()
            idle_modules = loading.idle_modules(parts, recipe)
            idle_shapes = [offload_weights(module) for module in idle_modules]
            trace.mark("training")
            self._add_weights(reload_weights(parts.denoiser, shapes))
            denoiser = loading.prepare(parts, skeleton_models.without_xformers(recipe))
            self.objective = replace(self.objective, preservation=self._preservation(denoiser))
            state = self._state(denoiser)
            self._steps(state)
            averages = self._averages(denoiser)
            if recipe.validates:
                with trace.phase("validation"), torch.no_grad(), self.autocast():
                    self._validate(denoiser)
            for module, module_shapes in zip(idle_modules, idle_shapes, strict=True):
                trace.add_module(reload_weights(module, module_shapes), "weights")
            if recipe.sample.every is not None:
                size = max(recipe.sample.images_per_prompt, recipe.prior.sample_batch_size)
                self._sample("sample", size, recipe.sample.guidance_scale)
            if recipe.evaluate.encoders:
                self._sample("evaluate", recipe.prior.sample_batch_size, recipe.sample.guidance_scale)
                with trace.phase("evaluate"):
                    tensors = [torch.empty(size, dtype=torch.uint8) for size in encoder_tensor_bytes(
                        recipe.evaluate, recipe.model.resolution)]
                    del tensors
            trace.mark("save")
            del averages
        if self.memory.fully_shard and recipe.hardware.gpus > 1:
            split_over_processes(trace, denoiser, gathered_bytes(denoiser), recipe.hardware.gpus)
        total = sum(_count_weights(p) for module in parts.modules for p in module.parameters())
        trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
        return Prediction(
            trace, trained, total - trained, encoder_bytes, self.picture_flops, self.encode_flops, block_bytes,
            self.copied_bytes, self.validation_flops, recipe.class_row_interval, self.memory.expandable_segments,
            None if self.memory.max_split_size_mb is None else self.memory.max_split_size_mb * MIB)

    def _encode_prompts(self) -> int:
        """Record the encoding of prompts, one after the other, with only the text encoders on the device.

        Return the number of bytes of their parameters. Afterwards they are released.
        """
        with self.trace.phase("prompts"):
            for encoder in self.encoders:
                self.trace.add_module(encoder, "weights")
            with torch.no_grad():
                self.parts.family.text(self.encoders, self._token_ids(1))
            size: int = sum(p.nbytes for encoder in self.encoders for p in encoder.parameters())
            for encoder in self.encoders:
                offload_weights(encoder)
                for buffer in encoder.buffers():
                    buffer.data = torch.empty(0, dtype=buffer.dtype)
        self.trace.mark("load")
        return size

    def _swap_blocks(self) -> tuple[int, ...]:
        """Move the blocks of memory.swap_blocks to host memory. Return the bytes of each block that can be swapped."""
        parts = self.parts
        blocks = parts.family.blocks(parts.denoiser)
        sizes = tuple(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks)
        if self.memory.swap_blocks:
            parts.swap = BlockSwap(blocks, self.memory.swap_blocks, torch.device("cpu"))
            self.trace.add(parts.swap.slots, "weights")
        return sizes

    def _add_weights(self, module: nn.Module) -> None:
        """Assign the weights of a module to their category. Those of swapped blocks are in host memory."""
        self.trace.add_module(module, "weights")
        if self.parts.swap is not None:
            self.trace.add([host.memory for host in self.parts.swap.hosts], HOST)

    def _copied(self) -> int:
        """Return the bytes that block swap has copied to the card so far."""
        return 0 if self.parts.swap is None else self.parts.swap.copies * self.parts.swap.slots[0].nbytes

    def _steps(self, state: TrainState) -> None:
        """Record two training steps. The second repeats the first, but the optimizer state already exists."""
        trace, start, before = self.trace, len(self.trace.events), self._copied()
        self._step(state)
        self.copied_bytes = (self._copied() - before, self.copied_bytes[1])
        trace.repeat(start, len(trace.events))
        for _ in range(1, self.recipe.class_row_interval):  # for the operations of steps without class rows
            self._step(state)

    def _step(self, state: TrainState) -> None:
        train = self.recipe.train
        self.trace.mark("forward")
        batches = [self._batch() for _ in range(self.recipe.micro_batches[1])]
        train_step(state, batches, self.objective, self.engine, train.max_grad_norm)
        del batches
        self.trace.mark("idle")

    def _validate(self, denoiser: nn.Module) -> None:
        """Record the forward pass of one chunk of held-out rows, see training/validation.py."""
        before, rows = self.trace.total_flops, min(self.recipe.train.train_batch_size, DRAWS)
        self.objective(denoiser, self._half(rows, self._photo_size()))
        self.validation_flops = (self.trace.total_flops - before) // rows

    def _autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return a function that creates the run's autocast context.

        The CPU's autocast takes the place of CUDA's (see fake_cuda.py).
        """
        dtype = self.recipe.precision.dtype
        if dtype is Dtype.fp32:
            return nullcontext
        return partial(torch.autocast, "cpu", loading.TORCH_DTYPE[dtype], cache_enabled=self.memory.autocast_cache)

    def _engine(self) -> PhaseMarkingEngine:
        """Build an engine that marks the phases of a step."""
        trace = self.trace
        scaler = FakeGradScaler(self.recipe.precision.dtype is Dtype.fp16, torch.ones(()))
        run_backward = Engine().backward

        def forward() -> AbstractContextManager[Any]:
            trace.mark("forward")
            return self.autocast()

        def backward(loss: Tensor) -> None:
            loss = scaler.scale(loss)
            trace.recategorize_live(TEMPORARIES, ACTIVATIONS)
            trace.mark("backward")
            run_backward(loss)

        return PhaseMarkingEngine(autocast=forward, backward=backward, scaler=scaler, mark=trace.mark)  # type: ignore[arg-type]

    def _state(self, denoiser: loading.TrainedModel) -> TrainState:
        """Build the training state, with a modelled optimizer, and assign categories to its tensors."""
        trace, recipe = self.trace, self.recipe
        on_host = self.memory.offload_optimizer

        def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            modelled = ModelledOptimizer(parameters, recipe.optimizer.kind, recipe.train.learning_rate)
            modelled.on_state = lambda tensor, paged: trace.add([tensor], HOST if paged or on_host else "optimizer")
            return modelled

        dtype = loading.TORCH_DTYPE[recipe.precision.dtype]
        optimizer = build_training_optimizer(denoiser, make_optimizer, self.memory, dtype, recipe.train.seed,
                                             parameter_groups(denoiser, recipe))
        self._add_weights(denoiser)
        masters = optimizer.masters if isinstance(optimizer, OffloadedOptimizer) else {}
        trace.add(masters.values(), HOST)
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    make_gradient_hook(trace, masters.get(name)))
        if recipe.hardware.gpus > 1 and not self.memory.fully_shard:  # reduced from a second copy, in buckets
            self.reduction_buckets = [torch.empty_like(p) for p in denoiser.parameters() if p.requires_grad]
            trace.add(self.reduction_buckets, "gradients")
        ema = None
        if recipe.train.use_ema:
            weights = masters or denoiser
            ema = PhaseMarkingEma(weights, recipe.train.ema_decay, every=self.memory.ema_every)
            ema.mark = trace.mark
            ema_on_host = on_host or self.memory.ema_device is EmaDevice.cpu
            trace.add(ema.average.values(), HOST if ema_on_host else "ema")
        return TrainState(denoiser, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), ema)

    def _averages(self, denoiser: nn.Module) -> list[Tensor]:
        """Return the copy of the weights, with optimizer=schedule_free, that samples, measures and exports use."""
        if not self.recipe.optimizer.kind.averages_weights:
            return []
        averages = [torch.empty_like(p) for p in denoiser.parameters() if p.requires_grad]
        self.trace.add(averages, HOST if self.memory.offload_optimizer else "ema")
        return averages

    def _batch(self) -> Batch:
        """Build a micro-batch with the same contents and dtypes as the micro-batches of data/batches.py.

        Each sample has its own caption. Latents and text states are computed here if the run does not cache them.
        """
        recipe, square = self.recipe, (self.recipe.model.resolution,) * 2
        sizes = [self._photo_size()] + [square] * recipe.with_class_images  # class images are square
        return join_batches([self._half(recipe.micro_batches[0], size) for size in sizes])

    def _preservation(self, denoiser: nn.Module) -> OutputPreservation | None:
        """Build the class rows of output preservation, with one denoising step, so that only the step is rehearsed."""
        recipe, parts = self.recipe, self.parts
        if not recipe.preserves_output:
            return None
        text = self._token_ids(1) if recipe.encodes_in_step else parts.family.blank_text(self.encoders, 1)
        preservation = output_preservation.build(
            recipe, denoiser, parts.noise_schedule(recipe), [text] * len(recipe.class_recipes), self._latent_shape(),
            self.engine, parts.family.uses_size_and_crop)
        return None if preservation is None else replace(preservation, steps=1)

    def _half(self, count: int, size: Size) -> Batch:
        """Build one half of a micro-batch, the photos or the class images: `count` samples of `size`."""
        recipe = self.recipe
        latents = torch.empty(count, *self._latent_shape(size))
        if not self.memory.cache_latents:
            mean, std = self.parts.encode(torch.empty(count, 3, *size))
            latents = mean + std * latents
        if recipe.encodes_in_step:
            text = self._token_ids(count)
        elif self.memory.cache_text:
            text = self.parts.family.blank_text(self.encoders, count)
        else:
            text = torch.cat([self._text_states(1) for _ in range(count)])
        noise, timesteps = torch.empty_like(latents), torch.zeros(count, dtype=torch.long)
        size_and_crop = torch.empty(count, 6) if self.parts.family.uses_size_and_crop else None
        return Batch(latents, noise, timesteps, text, count, size_and_crop=size_and_crop)

    def _cache(self) -> None:
        """Encode the largest batch of photos with the VAE, and one prompt with the text encoders."""
        if self.memory.cache_latents:
            side = self.recipe.model.resolution  # a square: no bucket has more pixels
            before, size = self.trace.total_flops, encode_batch_size(side, self.recipe.device)
            self.parts.encode(torch.empty(size, 3, side, side))
            self.encode_flops = (self.trace.total_flops - before) // size
        if self.memory.cache_text and not (self.recipe.encodes_in_step or self.encodes_ahead):
            self._text_states(1)

    @torch.no_grad()
    def _sample(self, phase: str, count: int, guidance: float) -> None:
        """Rehearse the generation of `count` images: one denoising step, because all need the same, and decoding."""
        trace = self.trace
        if self.sampled and self.sampled[0] == (count, guidance) and self._samples_as_before():
            trace.mark(phase)
            trace.repeat(*self.sampled[1:], marks=False)
            trace.mark("idle")
            return
        doubled = count * (2 if guidance > self.parts.family.no_guidance else 1)
        with trace.phase(phase), self.autocast():
            first_event, flops_before = len(trace.events), trace.total_flops
            text = self._text_states(doubled)
            latents = torch.empty(doubled, *self._latent_shape(), dtype=text.dtype)
            before = self._copied()
            noise = self.parts.predict(latents, torch.zeros((), dtype=torch.long), text)
            self.copied_bytes = (self.copied_bytes[0], (self._copied() - before) // count)
            flops_denoised = trace.total_flops
            picture = self.parts.decode(noise[:count])
            (picture / 2 + 0.5).clamp(0, 1).float()
            self.picture_flops = ((flops_denoised - flops_before) // count,
                                  (trace.total_flops - flops_denoised) // count)
            del text, latents, noise, picture
        self.sampled = (count, guidance), first_event, len(trace.events)

    def _samples_as_before(self) -> bool:
        """Return whether generating images uses the same kernels and dtypes after training as before training."""
        fused = self.recipe.attention.kind in (AttentionKind.sdpa, AttentionKind.xformers)
        plain = self.memory.weights is Weights.full and not self.memory.offload_optimizer
        return fused and plain and not self.recipe.method.low_rank

    @torch.no_grad()
    def _text_states(self, count: int) -> Tensor:
        """Return the text encoders' output for `count` prompts: stored encodings, or computed here."""
        if self.encodes_ahead:
            return self.parts.family.blank_text(self.encoders, count)
        return self.parts.text(self._token_ids(count)).float()

    def _token_ids(self, count: int) -> Tensor:
        return self.parts.family.blank_tokens(self.encoders, count)

    def _photo_size(self) -> Size:
        """Return the assumed size of the photos, because a plan reads no photos.

        With aspect-ratio buckets, it is the size of the bucket that needs the most memory. Otherwise it is the square
        with side model.resolution.
        """
        side, levels = self.recipe.model.resolution, self.parts.family.levels(self.parts.denoiser)
        return largest_bucket(side, self.parts.vae_scale, levels) if self.recipe.dataset.buckets else (side, side)

    def _latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        height, width = (side // self.parts.vae_scale for side in size or (self.recipe.model.resolution,) * 2)
        return self.parts.latent_channels, height, width


def encoder_tensor_bytes(evaluate: Evaluate, resolution: int) -> list[int]:
    """Return the sizes, in bytes, of the tensors that exist at the same time while images are scored.

    All encoders of a run are on the device at the same time.

    Args:
        resolution: side of the images in pixels.
    """
    encoders = [*evaluate.encoders, *(["lpips"] if evaluate.lpips else [])]
    return [*(ENCODER_WEIGHTS[name] for name in encoders), ENCODER_BATCH * 3 * resolution**2 * 4, ENCODER_ACTIVATIONS]
