"""The VAE of a run: the base's own, or the one that model.vae puts in its place."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dreambooth.config.recipe import Recipe
from dreambooth.config.storage import is_single
from dreambooth.errors import UserError
from dreambooth.models.components import half_overflows, says_fixed

FIX = "madebyollin/sdxl-vae-fp16-fix"  # SDXL's VAE, trained on until half does not overflow in it


def of_run(recipe: Recipe, dtype: torch.dtype, two_encoders: bool, weights: dict[str, Any]) -> Any:
    """In `dtype`; in fp32 where fp16 overflows in it.

    Args:
        weights: where the base's weights are, as diffusers takes it.

    Raises:
        UserError: the one that model.vae names cannot be loaded; of the base's own, what diffusers raises.
    """
    if own := recipe.vae_source:
        try:
            return _load(own, dtype, two_encoders, _place(own) | {"local_files_only": recipe.model.offline})
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"the VAE {own} could not be loaded ({reason(error)}): type another model.vae, a folder or "
                            "hub id, or model.vae=null for the base's own") from error
    return _load(recipe.source, dtype, two_encoders, weights | {"subfolder": "vae"})


def on_this_machine(source: str, dtype: torch.dtype) -> Any:
    """One to draw with, in `dtype`: pipelines of SDXL compute in fp32 where they must.

    Raises:
        OSError, ValueError, SafetensorError: it is not here, or broken.
    """
    return _load(source, dtype, False, _place(source) | {"local_files_only": True})


def configuration(source: str, base: dict[str, Any]) -> dict[str, Any]:
    """That of a VAE in place of a base's, for a plan: a folder's own; elsewhere the base's, in which half overflows
    unless the name is that of SDXL's fix, or of a file that says so, as for its conversion."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    for place in (Path(source) / "vae", Path(source)):
        if (place / "config.json").is_file():
            return dict(AutoencoderKL.load_config(place))
    fixed = says_fixed(Path(source).stem) if is_single(source) else source == FIX
    return base | {"force_upcast": not fixed}


def check(unet: Any, vae: Any, instead: str) -> None:
    """A UNet that is told of a picture or a mask too cannot be trained or drawn with here.

    Args:
        instead: what to type, the rest of a sentence.

    Raises:
        UserError: it is one.
    """
    reads, made = unet.config.in_channels, vae.config.latent_channels
    if reads != made:
        raise UserError(f"this model reads {reads} channels where its VAE makes {made}, as those for inpainting and "
                        f"editing do: type {instead}")


def other_base(recipe: Recipe) -> str:
    """What to type in training where the base does not do."""
    return "model.source=DIR, a model that draws from text alone" + ", or model.vae=null" * bool(recipe.vae_source)


def reason(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().partition("\n")[0][:200]


def _load(source: str, dtype: torch.dtype, two_encoders: bool, place: dict[str, Any]) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = AutoencoderKL.load_config(source, **{key: value for key, value in place.items() if key != "variant"})
    overflows = dtype is torch.float16 and half_overflows(dict(config), two_encoders)
    return AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32 if overflows else dtype, **place)


def _place(source: str) -> dict[str, Any]:
    """Inside a folder or hub id of its own: a whole model's folder has it in vae/."""
    return {"subfolder": "vae"} if (Path(source) / "vae/config.json").is_file() else {}
