"""Predicts what a run will take of a card: the very step that trains, on fake tensors, with the run's own recipe.

    blank parts -> class images -> caching -> train_step -> samples -> evaluation      recorded by a StorageTrace
    recorded events -> the allocator's model                              usage by phase and category

Nothing is computed and nothing is downloaded. What is modelled and not run: the optimizer (optim_memory.py), the
allocator (allocator.py), attention's workspaces (fakes.py) and evaluation's encoders (encoder_memory.py).
docs/planner.md holds it against published figures.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import AttentionKind, Dtype, EmaDevice, Weights
from dreambooth.config.recipe import Recipe
from dreambooth.data.aspect_buckets import Size, largest_bucket
from dreambooth.data.batch import Batch, join_batches
from dreambooth.data.batches import encode_batch_size
from dreambooth.models import loading
from dreambooth.optim.cpu_offload import OffloadedOptimizer
from dreambooth.optim.memory_levers import build_training_optimizer
from dreambooth.planner import skeleton_models
from dreambooth.planner.allocation_trace import ACTIVATIONS, HOST, TEMPORARIES, StorageTrace
from dreambooth.planner.caching_allocator import MIB
from dreambooth.planner.encoder_memory import encoder_tensor_bytes
from dreambooth.planner.fake_cuda import fake_gpu, fake_tensors, offload_weights, reload_weights, attention_workspace_bytes
from dreambooth.planner.optimizer_memory import ModelledOptimizer
from dreambooth.planner.phase_markers import PhaseMarkingEma, PhaseMarkingEngine, FakeGradScaler, make_gradient_hook
from dreambooth.planner.prediction import Prediction
from dreambooth.runtime.engine import Engine
from dreambooth.training.step import Objective, TrainState, train_step

CUBLAS = 8 * MIB + 128 * 1024  # its workspace, 8320 KiB: PyTorch's default :4096:2:16:8


def predict(recipe: Recipe) -> Prediction:
    """What the run will take.

    Raises:
        UserError: the shape of its base model is not known here.
    """
    cuda = recipe.device == "cuda"
    with fake_gpu(recipe.hardware.compute_capability) if cuda else fake_tensors():
        return rehearse(recipe)


def rehearse(recipe: Recipe) -> Prediction:
    """The same on tensors of whatever kind is current: real ones take the memory and the time that they say."""
    return _Rehearsal(recipe).prediction()


class _Rehearsal:
    """Walks through the phases of a run in its order."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.memory = recipe.memory
        self.trace = StorageTrace(attention_workspace_bytes)
        self.parts = skeleton_models.blank(recipe)
        self.objective = Objective(self.parts.noise_schedule(), recipe.prior.prior_loss_weight,
                                   recipe.train.snr_gamma, recipe.two_passes)
        self.autocast = self._autocast()
        self.engine = self._engine()
        self.drawn: tuple[tuple[int, float], int, int] | None = None  # what was drawn, and its events
        self.picture_flops, self.encode_flops = (0, 0), 0

    def prediction(self) -> Prediction:
        """Rehearse every phase."""
        trace, recipe, parts = self.trace, self.recipe, self.parts
        with trace:
            trace.mark("load")
            workspaces = torch.empty(CUBLAS if recipe.device == "cuda" else 0, dtype=torch.uint8)
            trace.add([workspaces], "workspace")
            for module in parts.modules:
                trace.add_module(module, "weights")
            if recipe.with_prior and recipe.prior.num_class_images:
                self._draw("class_images", recipe.prior.sample_batch_size, recipe.prior.guidance_scale)
            shapes = offload_weights(parts.unet)
            with trace.whole("caching"):
                self._cache()
            resting = [parts.vae] * self.memory.cache_latents
            resting += parts.encoders * (self.memory.cache_text and not recipe.train.train_text_encoder)
            gone = [offload_weights(module) for module in resting]
            trace.mark("training")
            trace.add_module(reload_weights(parts.unet, shapes), "weights")
            denoiser = loading.prepare(parts, skeleton_models.known_attention(recipe))
            state = self._state(denoiser)
            self._steps(state)
            for module, known in zip(resting, gone, strict=True):
                trace.add_module(reload_weights(module, known), "weights")
            if recipe.sample.every is not None:
                size = max(recipe.sample.images_per_prompt, recipe.prior.sample_batch_size)
                self._draw("sample", size, recipe.sample.guidance_scale)
            if recipe.evaluate.encoders:
                self._draw("evaluate", recipe.prior.sample_batch_size, recipe.sample.guidance_scale)
                with trace.whole("evaluate"):
                    seen = [torch.empty(size, dtype=torch.uint8) for size in encoder_tensor_bytes(
                        recipe.evaluate, recipe.model.resolution)]
                    del seen
            trace.mark("save")
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        every = sum(p.numel() for module in parts.modules for p in module.parameters())
        count = sum(p.numel() for p in trained)
        return Prediction(
            trace, count, every - count, sum(p.nbytes for p in trained), self.picture_flops, self.encode_flops,
            self.memory.expandable_segments,
            None if self.memory.max_split_size_mb is None else self.memory.max_split_size_mb * MIB)

    def _steps(self, state: TrainState) -> None:
        """Two steps. The second, whose optimizer has its state already, is the first one played again."""
        trace, train = self.trace, self.recipe.train
        start = len(trace.events)
        trace.mark("forward")
        batches = [self._batch() for _ in range(train.gradient_accumulation_steps)]
        train_step(state, batches, self.objective, self.engine, train.max_grad_norm)
        del batches
        trace.mark("idle")
        trace.repeat(start, len(trace.events))

    def _autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        dtype = self.recipe.precision.dtype
        if dtype is Dtype.fp32:
            return nullcontext
        return partial(torch.autocast, "cpu", loading.TORCH_DTYPE[dtype], cache_enabled=self.memory.autocast_cache)

    def _engine(self) -> PhaseMarkingEngine:
        trace = self.trace
        scaler = FakeGradScaler(self.recipe.precision.dtype is Dtype.fp16, torch.ones(()))
        walk = Engine().backward

        def forward() -> AbstractContextManager[Any]:
            trace.mark("forward")
            return self.autocast()

        def backward(loss: Tensor) -> None:
            loss = scaler.scale(loss)
            trace.rename_live(TEMPORARIES, ACTIVATIONS)
            trace.mark("backward")
            walk(loss)

        return PhaseMarkingEngine(autocast=forward, backward=backward, scaler=scaler, mark=trace.mark)  # type: ignore[arg-type]

    def _state(self, denoiser: nn.Module) -> TrainState:
        trace, recipe = self.trace, self.recipe
        on_host = self.memory.offload_optimizer

        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            made = ModelledOptimizer(parameters, recipe.optimizer.kind, recipe.train.learning_rate)
            made.on_state = lambda tensor, paged: trace.add([tensor], HOST if paged or on_host else "optimizer")
            return made

        optimizer = build_training_optimizer(denoiser, make, self.memory, loading.TORCH_DTYPE[recipe.precision.dtype], recipe.train.seed)
        trace.add_module(denoiser, "weights")
        masters = optimizer.masters if isinstance(optimizer, OffloadedOptimizer) else {}
        trace.add(masters.values(), HOST)
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    make_gradient_hook(trace, masters.get(name)))
        if recipe.hardware.gpus > 1:  # data parallel sums gradients in buckets of its own
            self.summed = [torch.empty_like(p) for p in denoiser.parameters() if p.requires_grad]
            trace.add(self.summed, "gradients")
        ema = None
        if recipe.train.use_ema:
            weights = masters or denoiser
            ema = PhaseMarkingEma(weights, recipe.train.ema_decay, every=self.memory.ema_every)
            ema.mark = trace.mark
            away = on_host or self.memory.ema_device is EmaDevice.cpu
            trace.add(ema.average.values(), HOST if away else "ema")
        return TrainState(denoiser, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), ema)

    def _batch(self) -> Batch:
        """A micro-batch as data.Batches makes it, each row with a caption of its own; what is not cached is made."""
        recipe, square = self.recipe, (self.recipe.model.resolution,) * 2
        sizes = [self._size()] + [square] * recipe.with_prior  # class images are made square
        return join_batches([self._half(recipe.train.train_batch_size, size) for size in sizes])

    def _half(self, count: int, size: Size) -> Batch:
        recipe = self.recipe
        latents = torch.empty(count, *self._latent_shape(size))
        if not self.memory.cache_latents:
            mean, std = self.parts.encode(torch.empty(count, 3, *size))
            latents = mean + std * latents
        if recipe.train.train_text_encoder:
            text = self._ids(count)
        elif self.memory.cache_text:
            text = self.parts.conditions.blank_text(self.parts.encoders, count)
        else:
            text = torch.cat([self._states(1) for _ in range(count)])
        noise, timesteps = torch.empty_like(latents), torch.zeros(count, dtype=torch.long)
        return Batch(latents, noise, timesteps, text, count)

    def _cache(self) -> None:
        """The largest chunk of photos through the VAE, one prompt through the text encoder."""
        if self.memory.cache_latents:
            side = self.recipe.model.resolution  # of the square: no bucket has more pixels
            before, size = self.trace.total_flops, encode_batch_size(side)
            self.parts.encode(torch.empty(size, 3, side, side))
            self.encode_flops = (self.trace.total_flops - before) // size
        if self.memory.cache_text and not self.recipe.train.train_text_encoder:
            self._states(1)

    @torch.no_grad()
    def _draw(self, phase: str, count: int, guidance: float) -> None:
        """One step of the pipeline and its decoder: the other steps take the same memory once more."""
        trace, begun = self.trace, len(self.trace.events)
        if self.drawn and self.drawn[0] == (count, guidance) and self._computes_as_before():
            trace.mark(phase)
            trace.repeat(*self.drawn[1:], marks=False)
            trace.mark("idle")
            return
        doubled = count * (2 if guidance > 1 else 1)
        with trace.whole(phase), self.autocast():
            begun, flops = len(trace.events), trace.total_flops
            text = self._states(doubled)
            latents = torch.empty(doubled, *self._latent_shape(), dtype=text.dtype)
            noise = self.parts.conditions.predict(
                self.parts.unet, latents, torch.zeros((), dtype=torch.long), text)
            denoised = trace.total_flops
            picture = self.parts.vae.decode(noise[:count].to(self.parts.vae.dtype), return_dict=False)[0]
            (picture / 2 + 0.5).clamp(0, 1).float()
            self.picture_flops = (denoised - flops) // count, (trace.total_flops - denoised) // count
            del text, latents, noise, picture
        self.drawn = (count, guidance), begun, len(trace.events)

    def _computes_as_before(self) -> bool:
        """Whether the UNet draws after training with the kernels and dtypes with which it drew before."""
        fused = self.recipe.attention.kind in (AttentionKind.sdpa, AttentionKind.xformers)
        plain = self.memory.weights is Weights.full and not self.memory.offload_optimizer
        return fused and plain and not self.recipe.method.low_rank

    @torch.no_grad()
    def _states(self, count: int) -> Tensor:
        return self.parts.conditions.text(self.parts.encoders, self._ids(count)).float()

    def _ids(self, count: int) -> Tensor:
        return self.parts.conditions.blank_tokens(self.parts.encoders, count)

    def _size(self) -> Size:
        """Of a photo: with buckets the one that takes most, since no photos are read."""
        side, levels = self.recipe.model.resolution, len(self.parts.unet.config.block_out_channels)
        return largest_bucket(side, self.parts.vae_scale, levels) if self.recipe.dataset.buckets else (side, side)

    def _latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        height, width = (side // self.parts.vae_scale for side in size or (self.recipe.model.resolution,) * 2)
        return self.parts.latent_channels, height, width
