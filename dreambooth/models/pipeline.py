"""Makes pictures: DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) through the family's pipeline."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError

from dreambooth.errors import UserError
from dreambooth.models import vae
from dreambooth.models.components import Components, zero_snr


@dataclass(frozen=True)
class Sampler:
    """How pictures are made; part of what class images are known by."""

    num_inference_steps: int
    guidance_scale: float
    resolution: int


def build_pipeline(parts: Components) -> Any:
    """A pipeline over live parts (nothing is copied), without safety checker: to look at training."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(parts.scheduler_config)
    return with_dpm_solver(pipeline_over(replace(parts, safety_checker=None, feature_extractor=None), scheduler))


def pipeline_over(parts: Components, scheduler: Any) -> Any:
    """The pipeline of the parts' family, over them."""
    shared = {"vae": parts.vae, "unet": parts.unet, "text_encoder": parts.text_encoder, "tokenizer": parts.tokenizer,
              "scheduler": scheduler, "feature_extractor": parts.feature_extractor}
    if parts.text_encoder_2 is not None:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            **shared, text_encoder_2=parts.text_encoder_2, tokenizer_2=parts.tokenizer_2, add_watermarker=False)
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline(
        **shared, safety_checker=parts.safety_checker, requires_safety_checker=parts.safety_checker is not None)


def open_pipeline(model: Path | str, device: str, revision: str | None = None, variant: str | None = None,
                  other_vae: str | None = None, zero_terminal_snr: bool = False) -> Any:
    """The pipeline in a diffusers folder, on `device`, sampling with DPM-Solver++; of a hub id, what this machine has.

    Args:
        other_vae: in place of the model's own: a folder, or a hub id.
        zero_terminal_snr: with the noise schedule that an adapter was trained with, see components.base_schedule.

    Raises:
        UserError: the folder cannot be opened, or is not of a model that draws from text alone.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    dtype = torch.float16 if device == "cuda" else torch.float32
    parts: dict[str, Any] = {}
    try:
        if other_vae is not None:
            parts["vae"] = vae.on_this_machine(other_vae, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the VAE {other_vae} that the run was trained with could not be opened ({vae.reason(error)}): "
                        f"put it back, or type base={model} to draw with that model's own") from error
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            model, torch_dtype=dtype, revision=revision, variant=variant, local_files_only=True, **parts)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the model in {model} could not be opened ({vae.reason(error)}): "
                        "train it again, type another run=DIR, or (of an adapter) base=DIR") from error
    if not hasattr(pipeline, "unet"):
        raise UserError(f"the model in {model} has no UNet: type base=DIR, one of Stable Diffusion 1.x, 2.x or SDXL")
    vae.check(pipeline.unet, pipeline.vae, "run=DIR or base=DIR, a model that draws from text alone")
    config = dict(pipeline.scheduler.config)
    if zero_terminal_snr:
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise UserError(f"the run has model.zero_terminal_snr=true and {model} predicts noise: type base=DIR, a "
                            "model that predicts v, or leave base out")
        config = zero_snr(config)
    return with_dpm_solver(pipeline, config).to(device)


def with_dpm_solver(pipeline: Any, config: dict[str, Any] | None = None) -> Any:
    """The same pipeline sampling with DPM-Solver++, without a progress bar of its own.

    Args:
        config: a scheduler's, whose noise schedule is taken; None: of the pipeline's.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config or pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def from_images(pipeline: Any) -> Any:
    """The same parts as a pipeline that begins with a picture (SDEdit, Meng et al. 2021, arXiv:2108.01073)."""
    import diffusers

    checks = {key: pipeline.config[key] for key in ("requires_safety_checker",) if key in pipeline.config}
    kind = type(pipeline).__name__.replace("Pipeline", "Img2ImgPipeline")  # StableDiffusion..., StableDiffusionXL...
    made = getattr(diffusers, kind)(**pipeline.components, **checks)
    made.set_progress_bar_config(disable=True)
    return made


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
    """Yield batches of pictures, one for each (prompt, seed). A picture depends on its own seed alone, up to how a
    batch of that size rounds; the global random state is not touched, and modules leave in the mode (train or eval)
    in which they came.

    Args:
        start: a picture to begin with, of the sampler's size; then `pipeline` is one of from_images.
        strength: how much of it is replaced: the share of the steps that are done.
    """
    parts = (getattr(pipeline, name, None) for name in ("unet", "text_encoder", "text_encoder_2"))
    modules = [part for part in parts if part is not None]
    for first in range(0, len(prompts), batch_size):
        chunk = slice(first, first + batch_size)
        count = len(prompts[chunk])
        more: dict[str, Any] = {"height": sampler.resolution, "width": sampler.resolution}
        if start is not None:
            more = {"image": [start] * count, "strength": strength}
        if negative_prompt is not None:
            more["negative_prompt"] = [negative_prompt] * count
        with evaluating(*modules), torch.no_grad(), autocast():
            images: list[Image] = pipeline(
                prompt=list(prompts[chunk]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]],
                num_inference_steps=sampler.num_inference_steps,
                guidance_scale=sampler.guidance_scale,
                **more,
            ).images
        yield images


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a while, then each module as it was."""
    were = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, training in zip(modules, were, strict=True):
            module.train(training)
