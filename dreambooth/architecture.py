"""Models by their shape alone: the parts of a base built from its configuration, without weights, disk or network."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreambooth import adapter
from dreambooth.choices import AttentionKind
from dreambooth.errors import UserError
from dreambooth.fakes import fake_tensors, to_dtype
from dreambooth.model import TORCH_DTYPE, Components, trained_modules
from dreambooth.packaged import asset
from dreambooth.recipe import Recipe

HUB = {  # names under which an architecture that ships here is published
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
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
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, text_encoder, vae, scheduler = _configurations(folder_of(recipe))
    frozen = TORCH_DTYPE[recipe.precision.dtype]
    text_dtype = torch.float32 if recipe.train.train_text_encoder else frozen
    parts = Components(
        unet=to_dtype(UNet2DConditionModel.from_config(unet), torch.float32),
        text_encoder=to_dtype(CLIPTextModel(CLIPTextConfig(**text_encoder)), text_dtype),
        vae=to_dtype(AutoencoderKL.from_config(vae), frozen),
        tokenizer=None, scheduler_config=scheduler)
    for module in trained_modules(parts, recipe).values() if recipe.method.low_rank else ():
        adapter.freeze(module, frozen, recipe.method.base_weights)
        module.to("cpu")  # the device that stands in: 4-bit codes are made on the way to it
    for module in (parts.unet, parts.text_encoder, parts.vae):
        module.requires_grad_(False).eval()
    return parts


def trained_weights(recipe: Recipe) -> int:
    """How many weights the recipe trains."""
    with fake_tensors():
        model = nn.ModuleDict(trained_modules(blank(recipe), recipe)).requires_grad_(True)
        if recipe.method.low_rank:
            adapter.inject(model, recipe.method, recipe.train.seed, recipe.precision.dtype)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def known_attention(recipe: Recipe) -> Recipe:
    """xformers is not here; PyTorch's memory-efficient kernel, which it shares, takes the same memory."""
    if recipe.attention.kind is AttentionKind.xformers:
        return replace(recipe, attention=replace(recipe.attention, kind=AttentionKind.sdpa))
    return recipe


@cache
def _configurations(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextConfig

    text = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder").to_dict()
    text.pop("dtype", None)
    return (dict(UNet2DConditionModel.load_config(folder, subfolder="unet")), text,
            dict(AutoencoderKL.load_config(folder, subfolder="vae")),
            dict(DDPMScheduler.load_config(folder, subfolder="scheduler")))
