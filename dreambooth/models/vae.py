"""The VAE of a run: the base's own, or the one that model.vae names in its place."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models.families.family import Family


def load_for_run(recipe: Recipe, family: Family, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Load the VAE in `dtype`, or in fp32 if fp16 overflows in it.

    Args:
        options: revision, variant and local_files_only of the base.

    Raises:
        UserError: the VAE that model.vae names cannot be loaded.
        OSError, ValueError, SafetensorError: the base's own VAE cannot be loaded.
    """
    if source := recipe.vae_source:
        try:
            return _load(family, source, dtype, _location(source) | {"local_files_only": recipe.model.offline})
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"the VAE {source} could not be loaded ({first_line(error)}): type another model.vae, a "
                            "folder or hub id, or model.vae=null for the base's own") from error
    return _load(family, recipe.source, dtype, options | {"subfolder": family.vae.name})


def load_for_pipeline(source: str, family: Family, dtype: torch.dtype) -> Any:
    """Load a VAE from this machine in `dtype`, to draw with. Pipelines compute in fp32 where fp16 overflows.

    Raises:
        OSError, ValueError, SafetensorError: it is not here, or is damaged.
    """
    return family.vae.load(source, dtype, **_location(source), local_files_only=True)


def planned_configuration(source: str, family: Family, base: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the VAE that replaces the base's, for a plan, which downloads nothing.

    A folder says its own. Of a hub id or a single file it is the base's; fp16 counts as overflowing in it unless its
    name says that it does not (as in its conversion, see single_file_sources.py).
    """
    for folder in (Path(source) / "vae", Path(source)):
        if (folder / "config.json").is_file():
            return family.vae.configuration(folder)
    return family.mark_half_safe(base, family.is_half_safe(source))


def check_channels(family: Family, denoiser: Any, vae: Any, instead: str) -> None:
    """Refuse a denoiser that also reads a picture or a mask: it can be neither trained nor drawn with here.

    Args:
        instead: what to type, the rest of a sentence.

    Raises:
        UserError: it is one.
    """
    reads, makes = family.latent_channels(denoiser), family.vae_channels(vae.config)
    if reads != makes:
        raise UserError(f"this model reads {reads} channels where its VAE makes {makes}, as those for inpainting and "
                        f"editing do: type {instead}")


def another_base(recipe: Recipe) -> str:
    """Return what to type if the base of a run cannot be trained."""
    return "model.source=DIR, a model that draws from text alone" + ", or model.vae=null" * bool(recipe.vae_source)


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, shortened."""
    return str(error).strip().partition("\n")[0][:200]


def _load(family: Family, source: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    configuration = family.vae.configuration(
        source, **{key: value for key, value in options.items() if key != "variant"})
    overflows = dtype is torch.float16 and family.half_overflows(configuration)
    return family.vae.load(source, torch.float32 if overflows else dtype, **options)


def _location(source: str) -> dict[str, Any]:
    """Return where in a folder or hub id the VAE is: a folder with a whole model has it in vae/."""
    return {"subfolder": "vae"} if (Path(source) / "vae/config.json").is_file() else {}
