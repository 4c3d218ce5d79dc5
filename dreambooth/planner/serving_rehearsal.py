"""Predicts the memory and the operations of generating one batch of pictures, as a server does.

The model is loaded as models/pipeline.open_pipeline loads it, with the memory options of inference. Its phases are
recorded on tensors without data in the order of the pipeline:

    load -> prompts -> denoise -> decode

Prompts and negative prompts are encoded one after the other. One denoising step is recorded, because all steps use the
same memory. With cpu_offload, only the parts that compute in a phase are on the card.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.enums import BaseWeights
from dreambooth.models.inference_memory import InferenceMemory, decode_in_parts
from dreambooth.planner import skeleton_models
from dreambooth.planner.allocation_trace import MARK, StorageTrace
from dreambooth.planner.caching_allocator import CachingAllocator
from dreambooth.planner.fake_cuda import (
    FLASH_CAPABILITY,
    attention_workspace_bytes,
    fake_gpu,
    fake_tensors,
    offload_weights,
    reload_weights,
    to_dtype,
)
from dreambooth.planner.rehearsal import CUBLAS_WORKSPACE
from dreambooth.planner.trace_replay import Usage, replay

PHASES = ("load", "prompts", "denoise", "decode")


@dataclass(frozen=True)
class ServedModel:
    """The model that a server holds, and the pictures that it draws in one batch."""

    source: str  # a diffusers folder or hub id
    name: str | None = None  # name in conf/model, for the architecture of a model that is not on this machine
    vae: str | None = None  # a folder, hub id or single file of the VAE that replaces the model's own
    adapter_bytes: int = 0  # of the adapters that are on the card at a time
    guidance_scale: float = 7.5
    batch: int = 1  # pictures
    size: tuple[int, int] | None = None  # height and width of a picture in pixels; None: the model's own resolution


@dataclass(frozen=True)
class Footprint:
    """Memory and operations of drawing one batch."""

    size: tuple[int, int]  # height and width of a picture in pixels
    by_phase: dict[str, Usage]
    flops: dict[str, int]  # operations of the phases prompts, denoise (one step) and decode
    kernels: int  # operators of a denoising step that allocate memory, about the number of kernels
    part_bytes: tuple[int, ...]  # weights of the parts as they are loaded, before quantisation; the denoiser is first
    weight_bytes: int  # of all parts, as they are on the card
    quantised: int  # weights that are dequantised in each denoising step
    half: bool  # whether the model computes in half precision
    vae_half: bool  # whether the VAE decodes in half precision

    @property
    def reserved(self) -> int:
        """Bytes of the card with which the allocator can serve all phases. It gives back unused segments if it must."""
        return max(usage.reserved for usage in self.by_phase.values())


def predict_serving(model: ServedModel, memory: InferenceMemory, capability: float | None) -> Footprint:
    """Predict the memory and the operations of drawing one batch.

    Args:
        capability: CUDA compute capability of the card; None: a CPU.

    Raises:
        UserError: the architecture of the model is unknown.
    """
    flash = None if capability is None else capability >= FLASH_CAPABILITY
    return _predict(model, memory, flash)


@lru_cache(maxsize=64)  # cards with the same kernels and precisions share a prediction
def _predict(model: ServedModel, memory: InferenceMemory, flash: bool | None) -> Footprint:
    context: AbstractContextManager[Any] = fake_tensors() if flash is None else fake_gpu(8.0 if flash else 7.0)
    with context:
        return rehearse_serving(model, memory, flash)


@torch.no_grad()
def rehearse_serving(model: ServedModel, memory: InferenceMemory, flash: bool | None) -> Footprint:
    """Rehearse drawing one batch, with tensors without data inside `fake_tensors` or `fake_gpu`, else with real ones.

    Args:
        flash: whether the card has the flash kernel and bf16; None: a CPU.
    """
    return _Rehearsal(model, memory, flash).footprint()


class _Rehearsal:
    """Rehearses the phases of one batch in order, and records them in a StorageTrace."""

    def __init__(self, model: ServedModel, memory: InferenceMemory, flash: bool | None) -> None:
        from dreambooth.models.pipeline import inference_dtype

        self.model, self.memory, self.cuda = model, memory, flash is not None
        family, _ = skeleton_models.architecture_of(model.source, model.name)
        self.dtype = inference_dtype(family, None if flash is None else (8, 0) if flash else (7, 0))
        self.trace = StorageTrace(attention_workspace_bytes)
        self.parts = skeleton_models.build_served(model.source, model.name, model.vae, self.dtype, memory.base_weights)
        self.shapes: dict[int, dict[str, torch.Size]] = {}
        side = family.native_side(self.parts.denoiser, self.parts.vae, self.parts.vae_scale)
        self.size = model.size or (side, side)
        decode_in_parts(self.parts.vae, memory)

    def footprint(self) -> Footprint:
        trace, parts, memory = self.trace, self.parts, self.memory
        if memory.cpu_offload:
            self.shapes = {id(module): offload_weights(module) for module in parts.modules}
        upcast = self.dtype is torch.float16 and parts.family.half_overflows(parts.vae.config)
        with trace:
            trace.mark("load")
            kept = [torch.empty(CUBLAS_WORKSPACE if self.cuda else 0, dtype=torch.uint8)]
            trace.add(kept, "workspace")
            others = torch.empty(self.model.adapter_bytes + self._extra_bytes(), dtype=torch.uint8)
            trace.add([others], "weights")
            if not memory.cpu_offload:
                for module in parts.modules:
                    trace.add_module(module, "weights")
            with trace.phase("prompts"):
                self._move_to_card(parts.encoders)
                text = self._text()
            self._move_to_host(parts.encoders)
            with trace.phase("denoise"):
                self._move_to_card([parts.denoiser])
                first = len(trace.events)
                latents = self._denoise(text)
                kernels = sum(serial != MARK and size > 0 for serial, size in trace.events[first:])
            self._move_to_host([parts.denoiser])
            with trace.phase("decode"):
                self._move_to_card([parts.vae])
                if upcast:
                    to_dtype(parts.vae, torch.float32)
                    trace.add_module(parts.vae, "weights")
                picture = parts.decode(latents)
                (picture / 2 + 0.5).clamp(0, 1).float()
                del picture
        usage = replay(trace.events, trace.category, trace.marks, CachingAllocator(full=True))
        half = self.dtype is not torch.float32
        flops = {phase: trace.flops.get(phase, 0) for phase in PHASES}
        return Footprint(self.size, {phase: usage[phase] for phase in PHASES}, flops, kernels,
                         *self._sizes(), half, half and not upcast)

    def _extra_bytes(self) -> int:
        """Return the bytes of parts that no run trains, such as a safety checker. cpu_offload does not move them."""
        folder = Path(self.model.source)
        is_here = (folder / "model_index.json").is_file()
        counts = [count for name, count in self.parts.family.extra_parts.items()
                  if not is_here or (folder / name).is_dir()]
        return sum(counts) * self.dtype.itemsize

    def _sizes(self) -> tuple[tuple[int, ...], int, int]:
        """Return the bytes of each part as it is loaded, those of all parts, and the number of quantised weights."""
        parts = self.parts

        def size(module: nn.Module) -> int:
            shapes = self.shapes.get(id(module), {})
            return sum(shapes[name].numel() * parameter.element_size() if name in shapes else parameter.nbytes
                       for name, parameter in module.named_parameters())

        sizes = [size(module) for module in parts.modules]
        if self.memory.base_weights is BaseWeights.half:
            return tuple(sizes), sum(sizes), 0
        quantised = sum(layer.in_features * layer.out_features for layer in parts.denoiser.modules()
                        if isinstance(layer, nn.Linear))
        bytes_per_weight = 0.5 if self.memory.base_weights is BaseWeights.nf4 else 1  # of the parameters alone
        loaded = sizes[0] + int(quantised * (self.dtype.itemsize - bytes_per_weight))
        return (loaded, *sizes[1:]), sum(sizes), quantised

    def _move_to_card(self, modules: Iterable[nn.Module]) -> None:
        for module in modules if self.memory.cpu_offload else ():
            self.trace.add_module(reload_weights(module, self.shapes[id(module)]), "weights")

    def _move_to_host(self, modules: Iterable[nn.Module]) -> None:
        for module in modules if self.memory.cpu_offload else ():
            offload_weights(module)

    def _text(self) -> Tensor:
        """Encode the prompts, and with guidance the negative prompts, which the denoiser reads together."""
        parts, batch = self.parts, self.model.batch
        guided = self.model.guidance_scale > parts.family.no_guidance
        return torch.cat([parts.text(parts.blank_tokens(batch)).to(self.dtype) for _ in range(1 + guided)])

    def _denoise(self, text: Tensor) -> Tensor:
        """Compute one denoising step with guidance; return the latents of the batch."""
        parts, (height, width) = self.parts, self.size
        latents = torch.empty(self.model.batch, parts.latent_channels, height // parts.vae_scale,
                              width // parts.vae_scale, dtype=self.dtype)
        doubled = torch.cat([latents] * (len(text) // self.model.batch))
        prediction = parts.predict(doubled, torch.zeros((), dtype=torch.long), text).float()
        if len(prediction) > self.model.batch:
            negative, positive = prediction.chunk(2)
            prediction = negative + self.model.guidance_scale * (positive - negative)
        return (latents.float() + prediction).to(self.dtype)
