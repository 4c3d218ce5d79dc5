"""Predicts what a run will take of a card: the very step that trains, on fake tensors, with the run's own recipe.

    blank parts -> class images -> caching -> train_step -> samples       recorded by a StorageTrace
    recorded events -> the allocator's model                              usage by phase and category

Nothing is computed and nothing is downloaded. What is modelled and not run: the optimizer (optim_memory.py), the
allocator (allocator.py), and attention's workspaces (fakes.py). docs/planner.md holds it against published figures.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth import architecture, model
from dreambooth.allocator import MIB, CachingAllocator
from dreambooth.choices import AttentionKind, Dtype, EmaDevice
from dreambooth.data import Batch
from dreambooth.ema import Ema
from dreambooth.engine import Engine
from dreambooth.fakes import fake_gpu, fake_tensors, workspace
from dreambooth.optim_memory import ModelledOptimizer
from dreambooth.recipe import Recipe
from dreambooth.replay import Usage, replay
from dreambooth.step import Objective, TrainState, train_step
from dreambooth.storage_trace import ACTIVATIONS, HOST, TEMPORARIES, StorageTrace

CUBLAS = 8 * MIB + 128 * 1024  # its workspace, 8320 KiB: PyTorch's default :4096:2:16:8
STEP = ("forward", "backward", "step", "ema")  # the phases of a training step


@dataclass(frozen=True)
class Prediction:
    """What a rehearsal showed. Sizes are bytes."""

    trace: StorageTrace = field(repr=False)
    expandable: bool
    trained: int  # weights
    frozen: int  # weights

    @cached_property
    def by_phase(self) -> dict[str, Usage]:
        """Usage at the fullest moment of each phase."""
        allocator = CachingAllocator(self.expandable)
        return replay(self.trace.events, self.trace.category, self.trace.marks, allocator)

    @property
    def reserved(self) -> int:
        return max(usage.reserved for usage in self.by_phase.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.by_phase, key=lambda phase: self.by_phase[phase].allocated)

    @property
    def peak(self) -> Usage:
        return self.by_phase[self.peak_phase]

    @property
    def step_flops(self) -> int:
        """Floating-point operations of one optimizer step, all micro-batches."""
        return sum(self.trace.flops.get(phase, 0) for phase in STEP)


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


@dataclass
class _Scaler:
    """What a GradScaler does to memory: a scaled loss. It unscales in place and never skips."""

    enabled: bool
    factor: Tensor

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor if self.enabled else loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def get_scale(self) -> float:
        return 1.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self) -> None: ...


@dataclass
class _MarkedEngine(Engine):
    """An Engine that says when a phase begins."""

    mark: Callable[[str], None] = lambda phase: None

    def clip(self, *args: Any) -> Tensor:
        self.mark("step")
        return super().clip(*args)


class _MarkedEma(Ema):
    mark: Callable[[str], None]

    def update(self, model: nn.Module) -> None:
        self.mark("ema")
        super().update(model)


class _Rehearsal:
    """Walks through the phases of a run in its order."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.trace = StorageTrace(workspace)
        self.parts = architecture.blank(recipe)
        self.objective = Objective(
            self.parts.noise_schedule(), recipe.prior.prior_loss_weight, recipe.train.snr_gamma)
        self.engine = self._engine()

    def prediction(self) -> Prediction:
        """Rehearse every phase."""
        trace, recipe, parts = self.trace, self.recipe, self.parts
        with trace:
            trace.mark("load")
            workspaces = torch.empty(CUBLAS if recipe.device == "cuda" else 0, dtype=torch.uint8)
            trace.add([workspaces], "workspace")
            for module in (parts.unet, parts.text_encoder, parts.vae):
                trace.add_module(module, "weights")
            if recipe.with_prior and recipe.prior.num_class_images:
                with trace.whole("class_images"):
                    self._draw(recipe.prior.sample_batch_size, recipe.prior.guidance_scale)
            denoiser = model.prepare(parts, _known_attention(recipe))
            with trace.whole("caching"):
                self._cache()
            state = self._state(denoiser)
            self._steps(state)
            if recipe.sample.every is not None:
                size = max(recipe.sample.images_per_prompt, recipe.prior.sample_batch_size)
                with trace.whole("sample"), state.ema.swapped_into(denoiser) if state.ema else nullcontext():
                    self._draw(size, recipe.sample.guidance_scale)
            trace.mark("save")
        weights = [p for module in (parts.unet, parts.text_encoder, parts.vae) for p in module.parameters()]
        return Prediction(trace, False, sum(p.numel() for p in weights if p.requires_grad),
                          sum(p.numel() for p in weights if not p.requires_grad))

    def _steps(self, state: TrainState) -> None:
        """Two steps. The second, whose optimizer has its state already, is the first one played again."""
        trace, train = self.trace, self.recipe.train
        start = len(trace.events)
        trace.mark("forward")
        batches = [self._batch() for _ in range(train.gradient_accumulation_steps)]
        train_step(state, batches, self.objective, self.engine, train.max_grad_norm)
        del batches
        trace.mark("idle")
        trace.repeat(start)

    def _engine(self) -> _MarkedEngine:
        trace, dtype = self.trace, self.recipe.precision.dtype
        scaler = _Scaler(dtype is Dtype.fp16, torch.ones(()))
        walk = Engine().backward

        def autocast() -> AbstractContextManager[Any]:
            if dtype is Dtype.fp32:
                return nullcontext()
            return torch.autocast("cpu", model.TORCH_DTYPE[dtype])

        def forward() -> AbstractContextManager[Any]:
            trace.mark("forward")
            return autocast()

        def backward(loss: Tensor) -> None:
            loss = scaler.scale(loss)
            trace.rename_live(TEMPORARIES, ACTIVATIONS)
            trace.mark("backward")
            walk(loss)

        self.autocast = autocast
        return _MarkedEngine(autocast=forward, backward=backward, scaler=scaler, mark=trace.mark)  # type: ignore[arg-type]

    def _state(self, denoiser: nn.Module) -> TrainState:
        trace, recipe = self.trace, self.recipe
        ema = None
        if recipe.train.use_ema:
            ema = _MarkedEma(denoiser, recipe.train.ema_decay)
            ema.mark = trace.mark
            trace.add(ema.average.values(), HOST if recipe.memory.ema_device is EmaDevice.cpu else "ema")
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(_gradient_to(trace))
        optimizer = ModelledOptimizer(trained, recipe.optimizer.kind.value, recipe.train.learning_rate)
        optimizer.on_state = lambda tensor, paged: trace.add([tensor], HOST if paged else "optimizer")
        return TrainState(denoiser, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), ema)

    def _batch(self) -> Batch:
        """A micro-batch as data.Batches makes it; what is not cached is computed here."""
        train, sides = self.recipe.train, 2 if self.recipe.with_prior else 1
        halves = [self._half(train.train_batch_size) for _ in range(sides)]
        latents, noise, timesteps, text = (torch.cat(part) for part in zip(*halves, strict=True))
        return Batch(latents, noise, timesteps, text, train.train_batch_size)

    def _half(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        recipe = self.recipe
        latents = torch.empty(count, *self._latent_shape())
        if not recipe.memory.cache_latents:
            mean, std = self.parts.encode(torch.empty(count, *self._pixel_shape()))
            latents = mean + std * latents
        text = self._ids(count)
        if not recipe.train.train_text_encoder:
            shape = (count, *text.shape[1:], self.parts.text_encoder.config.hidden_size)
            text = torch.empty(shape) if recipe.memory.cache_text else torch.cat(
                [self._states(1) for _ in range(count)])
        return latents, torch.empty_like(latents), torch.zeros(count, dtype=torch.long), text

    def _cache(self) -> None:
        """The largest chunk of photos through the VAE, one prompt through the text encoder."""
        if self.recipe.memory.cache_latents:
            self.parts.encode(torch.empty(16, *self._pixel_shape()))
        if self.recipe.memory.cache_text and not self.recipe.train.train_text_encoder:
            self._states(1)

    @torch.no_grad()
    def _draw(self, count: int, guidance: float) -> None:
        """One step of the pipeline and its decoder: the other steps take the same memory once more."""
        doubled = count * (2 if guidance > 1 else 1)
        with self.autocast():
            text = self._states(doubled)
            latents = torch.empty(doubled, *self._latent_shape(), dtype=text.dtype)
            noise = self.parts.unet(latents, torch.zeros((), dtype=torch.long), text, return_dict=False)[0]
            picture = self.parts.vae.decode(noise[:count].to(self.parts.vae.dtype), return_dict=False)[0]
            (picture / 2 + 0.5).clamp(0, 1).float()

    @torch.no_grad()
    def _states(self, count: int) -> Tensor:
        states: Tensor = self.parts.text_encoder(self._ids(count))[0]
        return states.float()

    def _ids(self, count: int) -> Tensor:
        return torch.zeros(count, self.parts.text_encoder.config.max_position_embeddings, dtype=torch.long)

    def _pixel_shape(self) -> tuple[int, int, int]:
        return 3, self.recipe.model.resolution, self.recipe.model.resolution

    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.recipe.model.resolution // self.parts.vae_scale
        return self.parts.latent_channels, side, side


def _gradient_to(trace: StorageTrace) -> Callable[[Tensor], None]:
    def label(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.add([parameter.grad], "gradients")

    return label


def _known_attention(recipe: Recipe) -> Recipe:
    """xformers is not here; PyTorch's memory-efficient kernel, which it shares, takes the same memory."""
    if recipe.attention.kind is AttentionKind.xformers:
        return replace(recipe, attention=replace(recipe.attention, kind=AttentionKind.sdpa))
    return recipe
