"""Draws pictures through the pipeline and the sampling scheduler of a model's family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError

from dreambooth.errors import UserError
from dreambooth.models import families, vae
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn; part of the key of class images."""

    num_inference_steps: int
    guidance_scale: float
    resolution: int


def build_pipeline(parts: Components) -> Any:
    """Return a pipeline over the live parts (nothing is copied), without safety checker, to draw from during a run."""
    bare = replace(parts, extras={})
    return without_bar(pipeline_over(bare, parts.family.sampling_scheduler(parts.scheduler_config)))


def pipeline_over(parts: Components, scheduler: Any) -> Any:
    """Return the pipeline of the parts' family, over them."""
    return parts.family.build_pipeline(
        parts.modules_by_name | parts.tokenizers_by_name | parts.extras, scheduler)


def open_pipeline(model: Path | str, device: str, revision: str | None = None, variant: str | None = None,
                  other_vae: str | None = None, zero_terminal_snr: bool = False) -> tuple[Any, Family]:
    """Open the pipeline in a diffusers folder, or a hub id that is on this machine.

    Args:
        device: to draw on.
        other_vae: a folder or hub id of a VAE that replaces the model's own.
        zero_terminal_snr: whether to draw with the rescaled noise schedule that an adapter was trained with, see
            components.training_scheduler.

    Returns:
        The pipeline on `device`, with the family's sampling scheduler, and the family.

    Raises:
        UserError: the folder cannot be opened, or its model does not draw from text alone.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    dtype = torch.float16 if device == "cuda" else torch.float32
    replaced: dict[str, Any] = {}
    try:
        family, _ = families.of_source(model, revision=revision, local_files_only=True)
        if other_vae is not None:
            replaced[family.vae.name] = _open_vae(other_vae, family, dtype, model)
        pipeline = DiffusionPipeline.from_pretrained(
            model, torch_dtype=dtype, revision=revision, variant=variant, local_files_only=True, **replaced)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the model in {model} could not be opened ({vae.first_line(error)}): "
                        "train it again, type another run=DIR, or (of an adapter) base=DIR") from error
    vae.check_channels(family, getattr(pipeline, family.denoiser.name), pipeline.vae,
                       "run=DIR or base=DIR, a model that draws from text alone")
    config = dict(pipeline.scheduler.config)
    if zero_terminal_snr:
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise UserError(f"the run has model.zero_terminal_snr=true and {model} predicts noise: type base=DIR, a "
                            "model that predicts v, or leave base out")
        config = family.rescale_to_zero_snr(config)
    pipeline.scheduler = family.sampling_scheduler(config)
    return without_bar(pipeline).to(device), family


def _open_vae(source: str, family: Family, dtype: torch.dtype, model: Path | str) -> Any:
    try:
        return vae.load_for_pipeline(source, family, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the VAE {source} that the run was trained with could not be opened "
                        f"({vae.first_line(error)}): put it back, or type base={model} to draw with that model's own"
                        ) from error


def without_bar(pipeline: Any) -> Any:
    """Switch off a pipeline's own progress bar; return the pipeline."""
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
    negative_prompt: str | None = None,
    start: Image | None = None,
    strength: float = 1.0,
) -> Iterator[list[Image]]:
    """Yield batches of pictures, one picture per (prompt, seed).

    A picture depends on its own prompt and seed, not on the other pictures of its batch; only rounding differs with the
    batch size. The global random state is not changed, and each module keeps its mode (train or eval).

    Args:
        autocast: context in which to compute.
        start: a picture to start from, of the sampler's size; `pipeline` is then one of Family.image_to_image.
        strength: how much of `start` is replaced: the fraction of the steps that are computed.
    """
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for first in range(0, len(prompts), batch_size):
        chunk = slice(first, first + batch_size)
        count = len(prompts[chunk])
        inputs: dict[str, Any] = {"height": sampler.resolution, "width": sampler.resolution}
        if start is not None:
            inputs = {"image": [start] * count, "strength": strength}
        if negative_prompt is not None:
            inputs["negative_prompt"] = [negative_prompt] * count
        with evaluating(*modules), torch.no_grad(), autocast():
            images: list[Image] = pipeline(
                prompt=list(prompts[chunk]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]],
                num_inference_steps=sampler.num_inference_steps,
                guidance_scale=sampler.guidance_scale,
                **inputs,
            ).images
        yield images


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules into eval mode inside the context, and back into their own mode after it."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.train(training)
