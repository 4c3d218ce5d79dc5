"""Generates pictures with a diffusers pipeline.

The pipeline's class and its sampling scheduler come from the model's family.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors import SafetensorError

from dreambooth.errors import Diverged, UserError
from dreambooth.models import families, hub, inference_memory, vae
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family
from dreambooth.models.inference_memory import PLAIN, InferenceMemory
from dreambooth.models.new_tokens import prompts as prompts_with_new_tokens
from dreambooth.models.prompt_encodings import PromptEncodings
from dreambooth.utils import quoting


@dataclass(frozen=True)
class Sampler:
    """Settings for generating pictures. The name of a class image folder contains a hash of them."""

    num_inference_steps: int
    guidance_scale: float
    resolution: int


class EncodedPipeline:
    """A diffusers pipeline without text encoders, which gets stored encodings in place of prompts.

    All other attributes are those of the diffusers pipeline.
    """

    def __init__(self, pipeline: Any, family: Family, encodings: PromptEncodings) -> None:
        self.pipeline, self.family, self.encodings = pipeline, family, encodings

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __call__(self, *, prompt: Sequence[str], negative_prompt: Sequence[str] | None = None, **arguments: Any) -> Any:
        """Call the diffusers pipeline with the encodings of the prompts, and with all other arguments."""
        text, negative = (torch.cat([self.encodings[one] for one in prompts])
                          for prompts in (prompt, negative_prompt or [""] * len(prompt)))
        return self.pipeline(**self.family.prompt_arguments(self.pipeline, text, negative), **arguments)


def build_pipeline(parts: Components) -> Any:
    """Return a pipeline for generating pictures during a run.

    It contains the modules and tokenizers of `parts` themselves, not copies. It has no safety checker.
    """
    bare = replace(parts, extras={})
    pipeline = without_bar(pipeline_over(bare, parts.family.sampling_scheduler(parts.scheduler_config)))
    return pipeline if parts.encodings is None else EncodedPipeline(pipeline, parts.family, parts.encodings)


def pipeline_over(parts: Components, scheduler: Any) -> Any:
    """Return the diffusers pipeline of `parts.family`, with `parts` themselves, not copies, and with `scheduler`.

    Text encoders that have been released are None in the pipeline.
    """
    released: dict[str, Any] = dict.fromkeys(part.name for part in parts.family.encoders)
    return parts.family.build_pipeline(
        released | parts.modules_by_name | parts.tokenizers_by_name | parts.extras, scheduler)


def open_pipeline(model: Path | str, device: str, revision: str | None = None, variant: str | None = None,
                  other_vae: str | None = None, zero_terminal_snr: bool = False,
                  memory: InferenceMemory = PLAIN) -> tuple[Any, Family]:
    """Open the pipeline of a diffusers folder, or of a hub id whose files are on this machine.

    Args:
        model: the folder or hub id.
        device: cpu or cuda, where the pipeline computes.
        revision, variant: options of from_pretrained.
        other_vae: a folder or hub id of a VAE that replaces the model's own.
        zero_terminal_snr: whether to rescale the noise schedule to zero terminal SNR. An adapter that was trained with
            the rescaled schedule (components.training_scheduler) needs this.
        memory: options that save memory of the device. Without cpu_offload, each part moves to the device before the
            next one is loaded.

    Returns:
        The pipeline, which computes on `device`, with the family's sampling scheduler; and the model's family.

    Raises:
        UserError: the model cannot be opened, needs another input beside text, or predicts noise although
            `zero_terminal_snr` is set.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    replaced: dict[str, Any] = {}
    try:
        family, _ = families.of_source(model, revision=revision, local_files_only=True)
        dtype = inference_dtype(family, torch.cuda.get_device_capability() if device == "cuda" else None)
        if other_vae is not None:
            replaced[family.vae.name] = _open_vae(other_vae, family, dtype, model)
        for part in family.parts():
            module = replaced.get(part.name) or part.load(
                str(model), dtype, subfolder=part.name, revision=revision, variant=variant, local_files_only=True)
            replaced[part.name] = inference_memory.prepare(module, memory, part is family.denoiser)
            if not memory.cpu_offload:
                module.to(device)
        pipeline = DiffusionPipeline.from_pretrained(
            model, torch_dtype=dtype, revision=revision, variant=variant, local_files_only=True, **replaced)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the model in {model} could not be opened ({hub.first_line(error)}): "
                        "train it again, type another run=DIR, or (of an adapter) base=DIR") from error
    vae.check_channels(family, getattr(pipeline, family.denoiser.name), pipeline.vae,
                       "run=DIR or base=DIR, a model that draws from text alone")
    pipeline.scheduler = sampling_scheduler(pipeline.scheduler.config, family, zero_terminal_snr, model)
    inference_memory.decode_in_parts(pipeline.vae, memory)
    if memory.cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return without_bar(pipeline), family


def sampling_scheduler(base_config: Mapping[str, Any], family: Family, zero_terminal_snr: bool,
                       model: Path | str) -> Any:
    """Return the family's sampling scheduler for a model.

    Args:
        base_config: the configuration of the model's own scheduler, or of a sampling scheduler that this function has
            returned, without zero terminal SNR.
        zero_terminal_snr: see `open_pipeline`.
        model: folder or hub id, for the message.

    Raises:
        UserError: the model predicts noise although `zero_terminal_snr` is set.
    """
    config = dict(base_config)
    if zero_terminal_snr:
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise UserError(f"the run has model.zero_terminal_snr=true and {model} predicts noise: type base=DIR, a "
                            "model that predicts v, or leave base out")
        config = family.rescale_to_zero_snr(config)
    return family.sampling_scheduler(config)


def inference_dtype(family: Family, capability: tuple[int, int] | None) -> torch.dtype:
    """Return the precision in which a model generates pictures.

    It is fp16 on a GPU. A model whose activations exceed the largest number of fp16 computes in bf16, and on a GPU
    without bf16 in fp32.

    Args:
        capability: CUDA compute capability of the GPU; None: a CPU, which computes in fp32.
    """
    if capability is None:
        return torch.float32
    if not family.overflows_in_fp16:
        return torch.float16
    return torch.bfloat16 if capability >= (8, 0) else torch.float32


def _open_vae(source: str, family: Family, dtype: torch.dtype, model: Path | str) -> Any:
    try:
        return vae.load_for_pipeline(source, family, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the VAE {source} that the run was trained with could not be opened "
                        f"({hub.first_line(error)}): put it back, or type "
                        f"{quoting.override('base', str(model))} to draw with that model's own") from error


def without_bar(pipeline: Any) -> Any:
    """Disable the progress bar of a diffusers pipeline; return the pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_images(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    map_batches: Callable[[Callable[[slice], list[Image]], Sequence[slice]], Iterator[list[Image]]] = map,
    negative_prompt: str | None = None,
    start: Image | None = None,
    strength: float = 1.0,
    size: tuple[int, int] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[list[Image]]:
    """Yield batches of pictures: one picture for each prompt, with the seed at the same position of `seeds`.

    A picture depends on its own prompt and seed, not on the other pictures of its batch; only rounding errors depend on
    the batch size. The global random state is not changed, and each module returns to its mode (train or eval).

    Raises:
        Diverged: a picture contains NaN.

    Args:
        autocast: creates the context in which the pipeline runs.
        map_batches: applies the function that draws a batch to every batch, in order. Engine.map_shared shares the
            batches between processes.
        start: a picture of sampler.resolution to start from; `pipeline` must then come from Family.image_to_image.
        strength: the fraction of the denoising steps that are computed, in (0, 1]. More steps replace more of `start`.
        size: width and height in pixels; None: a square of sampler.resolution.
        on_step: called after each denoising step of a batch with the number of completed steps and of all steps. An
            exception that it raises ends the batch.
    """
    family = families.of_pipeline(pipeline)
    arguments = family.sampling_arguments(pipeline)
    prompts_with_new_tokens.use_in(pipeline)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]

    def draw(chunk: slice) -> list[Image]:
        count = len(prompts[chunk])
        width, height = size or (sampler.resolution, sampler.resolution)
        inputs: dict[str, Any] = {"height": height, "width": width}
        if start is not None:
            own_size = {"height": start.height, "width": start.width} if "height" in _parameters(pipeline) else {}
            inputs = {"image": [start] * count, "strength": strength} | own_size
        inputs |= family.guidance_arguments(sampler.guidance_scale, count)
        if on_step is not None:
            inputs["callback_on_step_end"] = partial(_report_step, on_step)
        with evaluating(*modules), torch.no_grad(), autocast():
            if negative_prompt is not None:
                inputs |= _negative_arguments(pipeline, [negative_prompt] * count, arguments)
            pixels = pipeline(
                prompt=list(prompts[chunk]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]],
                num_inference_steps=sampler.num_inference_steps,
                output_type="np",
                **arguments,
                **inputs,
            ).images
        if np.isnan(pixels).any():
            raise Diverged(f"the pictures of {prompts[chunk.start]!r} are not finite: the model diverged, or its "
                           "numbers exceed its precision; type a lower train.learning_rate or precision=fp32, or for "
                           "generate another run=DIR, or CUDA_VISIBLE_DEVICES= before the command")
        images: list[Image] = pipeline.image_processor.numpy_to_pil(pixels)
        return images

    return map_batches(draw, [slice(first, first + batch_size) for first in range(0, len(prompts), batch_size)])


def _parameters(pipeline: Any) -> Collection[str]:
    return inspect.signature(type(pipeline).__call__).parameters


def _negative_arguments(pipeline: Any, prompts: list[str], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pipeline's arguments for negative prompts. A pipeline without such an argument takes encodings alone.

    Args:
        sampling: Family.sampling_arguments.
    """
    if "negative_prompt" in _parameters(pipeline):
        return {"negative_prompt": prompts}
    return {"negative_prompt_embeds": pipeline.encode_prompt(prompts, **sampling)[0]}


def _report_step(on_step: Callable[[int, int], None], pipeline: Any, step: int, timestep: Any,
                 tensors: dict[str, Any]) -> dict[str, Any]:
    """Call `on_step` for diffusers' callback_on_step_end, whose arguments these are."""
    on_step(step + 1, pipeline.num_timesteps)
    return tensors


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules into eval mode inside the context, and restore their previous modes after it."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.train(training)
