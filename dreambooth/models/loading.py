"""Loads the base model's parts and applies precision, attention and checkpointing."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dreambooth.config.enums import AttentionKind, BaseWeights, Dtype
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models import lora, vae
from dreambooth.models.components import Components as Components
from dreambooth.models.components import base_schedule, has, keep_vae_whole
from dreambooth.models.gradient_checkpointing import recompute
from dreambooth.models.pointwise_conv import as_products
from dreambooth.models.quantization import quantise
from dreambooth.models.text_conditioning import Conditions
from dreambooth.utils.hardware import importing
from dreambooth.utils.import_blocker import without_bitsandbytes

TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}


class Denoiser(nn.Module):
    """UNet and, if they train too, text encoders as one module, so that accumulation, data parallel, EMA and
    checkpoints always cover every trained weight."""

    def __init__(self, conditions: Conditions, unet: nn.Module, text_encoder: nn.Module | None = None,
                 text_encoder_2: nn.Module | None = None) -> None:
        super().__init__()
        self.conditions = conditions
        self.unet = unet
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Predict (N, C, h, w) from latents (N, C, h, w), timesteps (N,) and text (P, ...): token ids if text encoders
        train, what they make of them otherwise; see conditions.py. Each text is of the next N / P rows: a prompt that
        they share goes through the encoders once, and its gradient is the sum of theirs."""
        if self.text_encoder is not None:
            encoders = [self.text_encoder] if self.text_encoder_2 is None else [self.text_encoder, self.text_encoder_2]
            text = self.conditions.text(encoders, text)
        if len(text) < len(latents):
            text = text.repeat_interleave(len(latents) // len(text), 0)
        return self.conditions.predict(self.unet, latents, timesteps, text)


def denoiser_of(parts: Components, recipe: Recipe) -> Denoiser:
    """The module to train, over the live parts."""
    return Denoiser(parts.conditions, **trained_modules(parts, recipe))


def kept_in(recipe: Recipe, frozen: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The precision of the UNet and of the text encoders: fp32 of what trains, `frozen` of all else.

    The base of an adapter is frozen. Matrices and convolutions are kept in what autocast casts them to at every use, so
    that changes no number; norms and embeddings are rounded too, once, if the base's weights are finer than `frozen`.
    """
    trained = frozen if recipe.method.low_rank else torch.float32
    return trained, trained if recipe.train.train_text_encoder else frozen


def load(recipe: Recipe, device: torch.device, frozen: torch.dtype | None = None) -> Components:
    """Load the base: trained parts in fp32, frozen parts in the compute precision, or in `frozen`.

    Raises:
        UserError: the model is not where the recipe says, or lacks a part.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    base_weights = recipe.method.base_weights if frozen is None else BaseWeights.half
    frozen = frozen or TORCH_DTYPE[recipe.precision.dtype]
    unet_dtype, text_dtype = kept_in(recipe, frozen)
    source: dict[str, Any] = {"revision": recipe.model.revision, "local_files_only": recipe.model.offline}
    weights = source | {"variant": recipe.model.variant}
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(recipe.source, **source)  # type: ignore[assignment]
        parts = Components(
            unet=UNet2DConditionModel.from_pretrained(
                recipe.source, subfolder="unet", torch_dtype=unet_dtype, **weights),
            text_encoder=CLIPTextModel.from_pretrained(
                recipe.source, subfolder="text_encoder", dtype=text_dtype, **weights),
            vae=vae.of_run(recipe, frozen, has(index, "text_encoder_2"), weights),
            tokenizer=CLIPTokenizer.from_pretrained(recipe.source, subfolder="tokenizer", **source),
            scheduler_config=base_schedule(
                dict(DDPMScheduler.load_config(recipe.source, subfolder="scheduler", **source)), recipe),
        )
        if has(index, "text_encoder_2"):
            parts.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(
                recipe.source, subfolder="text_encoder_2", dtype=text_dtype, **weights)
            parts.tokenizer_2 = CLIPTokenizer.from_pretrained(recipe.source, subfolder="tokenizer_2", **source)
        if has(index, "safety_checker"):
            parts.safety_checker, parts.feature_extractor = _safety(recipe.source, frozen, weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_missing(recipe, error)) from error
    if recipe.method.low_rank and base_weights is BaseWeights.nf4:
        for module in trained_modules(parts, recipe).values():
            quantise(module, frozen)
    for module in parts.modules:
        module.requires_grad_(False).eval().to(device)
    keep_vae_whole(parts)
    vae.check(parts.unet, parts.vae, vae.other_base(recipe))
    _check_resolution(recipe, parts)
    return parts


def trained_modules(parts: Components, recipe: Recipe) -> dict[str, nn.Module]:
    """The modules that train, or get adapters, by their name in the Denoiser."""
    encoders = {"text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}
    trained = {name: module for name, module in encoders.items() if module is not None}
    return {"unet": parts.unet} | (trained if recipe.train.train_text_encoder else {})


def exact_frozen(parts: Components, recipe: Recipe) -> Components:
    """The same parts, the frozen ones in fp32 as the base has them: half is for computing, not for keeping. What an
    adapter has learned is merged into the base."""
    if recipe.precision.dtype is Dtype.fp32 and not recipe.method.low_rank:
        return parts
    whole = load(recipe, torch.device("cpu"), frozen=torch.float32)
    if recipe.method.low_rank:
        known = lora.learned(nn.ModuleDict(trained_modules(parts, recipe)))
        lora.merge(nn.ModuleDict(trained_modules(whole, recipe)), known)
        return whole
    frozen = {} if recipe.train.train_text_encoder else {
        "text_encoder": whole.text_encoder, "text_encoder_2": whole.text_encoder_2}
    return replace(parts, vae=whole.vae, safety_checker=whole.safety_checker, **frozen)


def prepare(parts: Components, recipe: Recipe) -> Denoiser:
    """Choose what trains, set attention and gradient checkpointing; returns the module to train."""
    set_attention(parts.unet, recipe.attention.kind)
    if recipe.train.channels_last:
        parts.unet.to(memory_format=torch.channels_last)
    elif recipe.device == "cpu" and recipe.precision.dtype is Dtype.fp32:
        as_products(parts.unet)
    if recipe.memory.gradient_checkpointing:
        apart = recipe.memory.split_prior and recipe.memory.optimizer_in_backward and recipe.with_prior
        recompute(parts.unet, groups=2 if apart else 1)
        for encoder in parts.encoders if recipe.train.train_text_encoder else ():
            encoder.gradient_checkpointing_enable()
    denoiser = denoiser_of(parts, recipe)
    if recipe.method.low_rank:
        lora.inject(denoiser, recipe.method, recipe.train.seed, recipe.precision.dtype)
    else:
        denoiser.requires_grad_(True)
    for module in parts.conditions.unused(parts.encoders):
        module.requires_grad_(False)
    return denoiser.train()


def set_attention(unet: Any, kind: AttentionKind) -> None:
    """Switch the UNet's attention kernels."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    match kind:
        case AttentionKind.sdpa:
            unet.set_attn_processor(AttnProcessor2_0())
        case AttentionKind.eager:
            unet.set_attn_processor(AttnProcessor())
        case AttentionKind.sliced:
            unet.set_attention_slice("max")
        case AttentionKind.xformers:
            unet.enable_xformers_memory_efficient_attention()


def import_libraries() -> None:
    """Everything that loading a model needs, at once, and without progress bars beside ours; downloads keep theirs."""
    with importing():
        import diffusers
        import transformers

        for library, variable in ((diffusers, "DIFFUSERS_VERBOSITY"), (transformers, "TRANSFORMERS_VERBOSITY")):
            library.utils.logging.disable_progress_bar()
            if variable not in os.environ:
                library.utils.logging.set_verbosity_error()  # their advice is not for our users
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks up for 4-bit kernels that nobody asks for
        with without_bitsandbytes():
            import diffusers.models.unets.unet_2d_condition
            import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion


def _safety(source: str, dtype: torch.dtype, weights: dict[str, Any]) -> tuple[Any, Any]:
    """The base's safety checker and its image processor."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    checker = StableDiffusionSafetyChecker.from_pretrained(
        source, subfolder="safety_checker", dtype=dtype, **weights)
    plain = {key: value for key, value in weights.items() if key != "variant"}
    return checker, CLIPImageProcessor.from_pretrained(source, subfolder="feature_extractor", **plain)


def _missing(recipe: Recipe, error: Exception) -> str:
    reason = vae.reason(error)
    if recipe.source.startswith((".", "/", "~")) or Path(recipe.source).exists():
        half = not recipe.model.variant and any(Path(recipe.source).glob("unet/*.fp16.safetensors"))
        hint = "type model.variant=fp16" if half else (
            "type model.source=DIR, a folder with unet, vae, text_encoder, tokenizer and scheduler")
    elif recipe.model.offline:
        hint = "type model.offline=false to ask the hub, or model.source=DIR"
    else:
        hint = "check the id and the network, or type model.source=DIR for a folder on this machine"
    return f"the base model {recipe.source} could not be loaded ({reason}): {hint}"


def _check_resolution(recipe: Recipe, parts: Components) -> None:
    side = parts.vae_scale
    if recipe.model.resolution % side:
        raise UserError(f"this model works on multiples of {side} pixels: type model.resolution="
                        f"{max(side, recipe.model.resolution // side * side)}")
