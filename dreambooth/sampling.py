"""Makes pictures: DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) through the family's pipeline."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from dreambooth.errors import UserError
from dreambooth.model import Components


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


def open_pipeline(model: Path, device: str) -> Any:
    """The pipeline in a diffusers folder, on `device`, sampling with DPM-Solver++.

    Raises:
        UserError: the folder cannot be opened.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the model in {model} could not be opened ({str(error).splitlines()[0]}): "
                        "train it again, or type another run=DIR") from error
    return with_dpm_solver(pipeline).to(device)


def with_dpm_solver(pipeline: Any) -> Any:
    """The same pipeline sampling with DPM-Solver++, without a progress bar of its own."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[list[Image]]:
    """Yield batches of pictures, one for each (prompt, seed). A picture depends on its own seed alone, up to how a
    batch of that size rounds; the global random state is not touched, and modules leave in the mode (train or eval)
    in which they came."""
    parts = (getattr(pipeline, name, None) for name in ("unet", "text_encoder", "text_encoder_2"))
    modules = [part for part in parts if part is not None]
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        with evaluating(*modules), torch.no_grad(), autocast():
            images: list[Image] = pipeline(
                prompt=list(prompts[chunk]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]],
                num_inference_steps=sampler.num_inference_steps,
                guidance_scale=sampler.guidance_scale,
                height=sampler.resolution, width=sampler.resolution,
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
