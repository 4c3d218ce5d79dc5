"""Loads the base model's parts and applies precision, attention and checkpointing."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth import adapter
from dreambooth.choices import AttentionKind, BaseWeights, Dtype
from dreambooth.errors import UserError
from dreambooth.loss import Schedule
from dreambooth.machine import importing
from dreambooth.recipe import Recipe
from dreambooth.recompute import recompute
from dreambooth.unasked import without_bitsandbytes

TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}


@dataclass
class Components:
    """The parts of a StableDiffusionPipeline, each on the training device."""

    unet: Any
    text_encoder: Any
    vae: Any
    tokenizer: Any
    scheduler_config: dict[str, Any]
    safety_checker: Any = None
    feature_extractor: Any = None

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def vae_scale(self) -> int:
        """Pixels of a side per latent: 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.config.scaling_factor)

    def noise_schedule(self) -> Schedule:
        """The forward process that the base was trained with, after any zero-terminal-SNR rescale."""
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        scheduler = DDPMScheduler.from_config(self.scheduler_config, clip_sample=False)
        return Schedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, C, h, w), fp32, of the latents of `pixels` (N, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            moments = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return moments.mean.float(), moments.std.float()

    def tokens(self, prompt: str) -> Tensor:
        """Token ids (1, L), padded to the length that the base was trained with.

        Raises:
            UserError: the prompt has more tokens than the model reads.
        """
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(prompt).input_ids
        if len(ids) > length:
            raise UserError(f"this model reads {length} tokens and the prompt has {len(ids)}: shorten {prompt!r}")
        padded = self.tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt").input_ids
        return torch.as_tensor(padded).to(self.text_encoder.device)

    def hidden_states(self, prompt: str) -> Tensor:
        """What the frozen text encoder makes of a prompt, (1, L, D), fp32."""
        with torch.no_grad():
            states: Tensor = self.text_encoder(self.tokens(prompt))[0]
        return states.float()


class Denoiser(nn.Module):
    """UNet and, if it trains too, text encoder as one module, so that accumulation, data parallel, EMA and
    checkpoints always cover every trained weight."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Predict (N, C, h, w) from latents (N, C, h, w), timesteps (N,) and text: ids (N, L) if the text encoder
        trains, hidden states (N, L, D) otherwise."""
        states = text if self.text_encoder is None else self.text_encoder(text)[0]
        prediction: Tensor = self.unet(latents, timesteps, states, return_dict=False)[0]
        return prediction


def load(recipe: Recipe, device: torch.device, frozen: torch.dtype | None = None) -> Components:
    """Load the base: trained parts in fp32, frozen parts in the compute precision, or in `frozen`.

    Raises:
        UserError: the model is not where the recipe says, or lacks a part.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    base_weights = recipe.method.base_weights if frozen is None else BaseWeights.half
    frozen = frozen or TORCH_DTYPE[recipe.precision.dtype]
    trained = torch.float32
    text_dtype = trained if recipe.train.train_text_encoder else frozen
    source: dict[str, Any] = {"revision": recipe.model.revision, "local_files_only": recipe.model.offline}
    weights = source | {"variant": recipe.model.variant}
    try:
        parts = Components(
            unet=UNet2DConditionModel.from_pretrained(
                recipe.source, subfolder="unet", torch_dtype=trained, **weights),
            text_encoder=CLIPTextModel.from_pretrained(
                recipe.source, subfolder="text_encoder", dtype=text_dtype, **weights),
            vae=AutoencoderKL.from_pretrained(recipe.source, subfolder="vae", torch_dtype=frozen, **weights),
            tokenizer=CLIPTokenizer.from_pretrained(recipe.source, subfolder="tokenizer", **source),
            scheduler_config=dict(DDPMScheduler.load_config(recipe.source, subfolder="scheduler", **source)),
        )
        parts.safety_checker, parts.feature_extractor = _safety(recipe.source, frozen, weights)
    except (OSError, ValueError) as error:
        raise UserError(_missing(recipe, error)) from error
    for module in trained_modules(parts, recipe).values() if recipe.method.low_rank else ():
        adapter.freeze(module, frozen, base_weights)
    for module in (parts.unet, parts.text_encoder, parts.vae):
        module.requires_grad_(False).eval().to(device)
    _check_resolution(recipe, parts)
    return parts


def trained_modules(parts: Components, recipe: Recipe) -> dict[str, nn.Module]:
    """The modules that train, or get adapters, by their name in the Denoiser."""
    return {"unet": parts.unet} | ({"text_encoder": parts.text_encoder} if recipe.train.train_text_encoder else {})


def exact_frozen(parts: Components, recipe: Recipe) -> Components:
    """The same parts, the frozen ones in fp32 as the base has them: half is for computing, not for keeping. What an
    adapter has learned is merged into the base."""
    if recipe.precision.dtype is Dtype.fp32 and not recipe.method.low_rank:
        return parts
    whole = load(recipe, torch.device("cpu"), frozen=torch.float32)
    if recipe.method.low_rank:
        known = adapter.learned(nn.ModuleDict(trained_modules(parts, recipe)))
        adapter.merge(nn.ModuleDict(trained_modules(whole, recipe)), known)
        return whole
    text_encoder = parts.text_encoder if recipe.train.train_text_encoder else whole.text_encoder
    return replace(parts, vae=whole.vae, text_encoder=text_encoder, safety_checker=whole.safety_checker)


def prepare(parts: Components, recipe: Recipe) -> Denoiser:
    """Choose what trains, set attention and gradient checkpointing; returns the module to train."""
    set_attention(parts.unet, recipe.attention.kind)
    if recipe.train.channels_last:
        parts.unet.to(memory_format=torch.channels_last)
    if recipe.memory.gradient_checkpointing:
        apart = recipe.memory.split_prior and recipe.memory.optimizer_in_backward and recipe.with_prior
        recompute(parts.unet, groups=2 if apart else 1)
        if recipe.train.train_text_encoder:
            parts.text_encoder.gradient_checkpointing_enable()
    denoiser = Denoiser(parts.unet, parts.text_encoder if recipe.train.train_text_encoder else None)
    if recipe.method.low_rank:
        adapter.inject(denoiser, recipe.method, recipe.train.seed, recipe.precision.dtype)
    else:
        denoiser.requires_grad_(True)
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
    """The base's safety checker and its image processor, or (None, None) if it has none."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    index: dict[str, Any] = DiffusionPipeline.load_config(  # type: ignore[assignment]
        source, revision=weights["revision"], local_files_only=weights["local_files_only"])
    if (index.get("safety_checker") or [None])[0] is None:
        return None, None
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    checker = StableDiffusionSafetyChecker.from_pretrained(
        source, subfolder="safety_checker", dtype=dtype, **weights)
    plain = {key: value for key, value in weights.items() if key != "variant"}
    return checker, CLIPImageProcessor.from_pretrained(source, subfolder="feature_extractor", **plain)


def _missing(recipe: Recipe, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200]
    if recipe.source.startswith((".", "/", "~")) or Path(recipe.source).exists():
        hint = "type model.source=DIR, a folder with unet, vae, text_encoder, tokenizer and scheduler"
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
