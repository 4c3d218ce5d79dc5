"""Loads the VAE of a run: the base model's own VAE, or the VAE that model.vae names as a replacement."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models import hub
from dreambooth.models.families.family import Family


def load_for_run(recipe: Recipe, family: Family, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Load the VAE of a run in `dtype`, or in fp32 if `dtype` is fp16 and the VAE overflows in fp16.

    Args:
        options: revision, variant and local_files_only, for loading from the base model.

    Raises:
        UserError: the VAE that model.vae names cannot be loaded.
        OSError, ValueError, SafetensorError: the base model's own VAE cannot be loaded.
    """
    if source := recipe.vae_source:
        offline = hub.local_files_only(source, recipe.model.offline)
        try:
            return _load(family, source, dtype, _location(source) | {"local_files_only": offline})
        except (OSError, ValueError, SafetensorError) as error:
            reason = hub.failure_reason(error, source, recipe.model.offline)
            raise UserError(f"the VAE {source} could not be loaded ({reason}): type another model.vae, a folder or hub "
                            "id, or model.vae=null for the base's own") from error
    return _load(family, recipe.source, dtype, options | {"subfolder": family.vae.name})


def load_for_pipeline(source: str, family: Family, dtype: torch.dtype) -> Any:
    """Load a VAE from this machine in `dtype`, for a pipeline that generates pictures.

    Unlike `load_for_run`, this function uses `dtype` even if it is fp16 and the VAE overflows in fp16. The pipeline
    itself runs such a VAE in fp32.

    Raises:
        OSError, ValueError, SafetensorError: the VAE is not on this machine, or is damaged.
    """
    return family.vae.load(source, dtype, **_location(source), local_files_only=True)


def planned_configuration(source: str, family: Family, base: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the VAE that replaces the base model's, for the planner, which downloads nothing.

    If `source` is a folder, its config.json is read. If `source` is a hub id or a single file, the result is a copy of
    `base` in which only the mark for overflow in fp16 is replaced. `Family.is_half_safe` chooses the new mark from the
    name of `source`. The conversion of single files uses the same rule (single_file_sources.py).

    Args:
        source: the VAE that replaces the base model's: a folder, a hub id or a single file.
        base: the configuration of the base model's own VAE.
    """
    for folder in (Path(source) / "vae", Path(source)):
        if (folder / "config.json").is_file():
            return family.vae.configuration(folder)
    return family.mark_half_safe(base, family.is_half_safe(source))


def check_channels(family: Family, denoiser: Any, vae: Any, instead: str) -> None:
    """Check that the denoiser reads latents alone.

    Denoisers for inpainting and editing, which also read a mask or a picture, can be neither trained nor used here.

    Args:
        instead: what the user can type instead. The error message ends with this text.

    Raises:
        UserError: the denoiser reads another number of channels than the VAE outputs.
    """
    reads, makes = family.latent_channels(denoiser), family.vae_channels(vae.config)
    if reads != makes:
        raise UserError(f"this model reads {reads} channels where its VAE makes {makes}, as those for inpainting and "
                        f"editing do: type {instead}")


def another_base(recipe: Recipe) -> str:
    """Return what the user can type if a run's base model cannot be trained. The error message ends with this text."""
    return "model.source=DIR, a model that draws from text alone" + ", or model.vae=null" * bool(recipe.vae_source)


def _load(family: Family, source: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    configuration = family.vae.configuration(
        source, **{key: value for key, value in options.items() if key != "variant"})
    overflows = dtype is torch.float16 and family.half_overflows(configuration)
    return family.vae.load(source, torch.float32 if overflows else dtype, **options)


def _location(source: str) -> dict[str, Any]:
    """Return options that locate the VAE in `source`: {"subfolder": "vae"} for a folder of a whole model, else {}."""
    return {"subfolder": "vae"} if (Path(source) / "vae/config.json").is_file() else {}
