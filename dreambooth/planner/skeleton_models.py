"""Builds base models from their configuration files, without loading weights. This needs no network."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dreambooth.config.enums import AttentionKind, BaseWeights
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models import families, lora, text_encoders, vae
from dreambooth.models.components import Components, disable_vae_autocast, training_scheduler
from dreambooth.models.families.family import Family
from dreambooth.models.families.part import Part
from dreambooth.models.loading import TORCH_DTYPE, TrainedModel, part_dtypes, trained_model, trained_modules
from dreambooth.models.new_tokens.attach import attach as attach_new_tokens
from dreambooth.models.quantization import quantise
from dreambooth.planner.fake_cuda import fake_tensors, to_dtype
from dreambooth.utils.assets import resolve_asset


def find_architecture(recipe: Recipe) -> tuple[Family, Path]:
    """Return the family of the recipe's base model, and the folder with its configuration files.

    Raises:
        UserError: no folder contains a model of a known family.
    """
    return architecture_of(recipe.source, recipe.model.name)


def architecture_of(source: str, name: str | None = None) -> tuple[Family, Path]:
    """Return the family of a model, and the folder with its configuration files.

    The folder is the model's own folder if it contains configuration files, and otherwise one in assets/architectures.

    Args:
        source: a diffusers folder or hub id.
        name: name of the model in conf/model, for a model that is neither a folder here nor the id of a family.

    Raises:
        UserError: none of these folders contains a model of a known family.
    """
    names = filter(None, (families.architecture_of(source), name))
    packaged = [Path(resolve_asset("package:architectures")) / name for name in names]
    for folder in (Path(source), *packaged):
        if family := families.of_folder(folder):
            return family, folder
    raise UserError(f"the architecture of {source} is unknown: type model.source=DIR, a folder with its "
                    "unet/config.json, vae/config.json and text_encoder/config.json")


def build_skeleton(recipe: Recipe) -> Components:
    """Build the parts of the base model that `loading.load` would load, with the same dtypes.

    Weights have arbitrary values, and there are no tokenizers. Call this function inside `fake_tensors` or
    `fake_gpu`. Outside them, it builds real tensors, which is possible only for small models.

    Raises:
        UserError: the architecture of the base model is unknown.
    """
    family, folder = find_architecture(recipe)
    configurations, scheduler_config = _read_configurations(family, folder, recipe.vae_source)
    frozen = TORCH_DTYPE[recipe.precision.dtype]
    denoiser_dtype, text_dtype = part_dtypes(recipe, frozen)
    overflows = frozen is torch.float16 and family.half_overflows(configurations[family.vae.name])
    ahead = text_encoders.encodes_ahead(family, recipe)
    parts = Components(
        family=family,
        denoiser=to_dtype(_build(family.denoiser, configurations[family.denoiser.name]), denoiser_dtype),
        vae=to_dtype(_build(family.vae, configurations[family.vae.name]), torch.float32 if overflows else frozen),
        encoders=[_build_encoder(part, configurations[part.name], text_dtype, ahead)
                  for part in family.encoders],
        tokenizers=[None for _ in family.tokenizers],
        scheduler_config=training_scheduler(family, scheduler_config, recipe))
    vae.check_channels(family, parts.denoiser, parts.vae, vae.another_base(recipe))
    if recipe.method.low_rank:
        for module in trained_modules(parts, recipe).values():
            _quantise(module, frozen, recipe.method.base_weights)
    for module in parts.modules:
        module.requires_grad_(False).eval()
    disable_vae_autocast(parts)
    attach_new_tokens(parts, recipe)
    return parts


def build_served(source: str, name: str | None, vae_source: str | None, dtype: torch.dtype,
                 base_weights: BaseWeights) -> Components:
    """Build the parts of a model as a pipeline for inference has them (models/pipeline.open_pipeline).

    Call this function inside `fake_tensors` or `fake_gpu`; see `build_skeleton`.

    Args:
        source, name: see `architecture_of`.
        vae_source: a folder, hub id or single file of the VAE that replaces the model's own; None: its own.
        dtype: precision of all parts.
        base_weights: format of the denoiser's linear layers.

    Raises:
        UserError: the architecture of the model is unknown.
    """
    family, folder = architecture_of(source, name)
    configurations, scheduler_config = _read_configurations(family, folder, vae_source)
    parts = Components(
        family=family, denoiser=to_dtype(_build(family.denoiser, configurations[family.denoiser.name]), dtype),
        vae=to_dtype(_build(family.vae, configurations[family.vae.name]), dtype),
        encoders=[to_dtype(_build(part, configurations[part.name]), dtype) for part in family.encoders],
        tokenizers=[None for _ in family.tokenizers], scheduler_config=scheduler_config)
    _quantise(parts.denoiser, dtype, base_weights)
    for module in parts.modules:
        module.requires_grad_(False).eval()
    return parts


def _quantise(module: torch.nn.Module, dtype: torch.dtype, base_weights: BaseWeights) -> None:
    """Convert the linear layers of a module to `base_weights`, as they are on the card."""
    if base_weights is BaseWeights.half:
        return
    quantise(module, dtype, base_weights)
    module.to("cpu")  # the CPU stands for the card: bitsandbytes packs weights when they move to their device
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # on some CPUs: a format that no card has
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010


def _build(part: Part, configuration: Mapping[str, Any]) -> Any:
    """Build a part in fp32, whatever the precision of its saved weights is."""
    return part.build({key: value for key, value in configuration.items() if key != "dtype"})


def _build_encoder(part: Part, configuration: Mapping[str, Any], dtype: torch.dtype, ahead: bool) -> Any:
    """Build a text encoder.

    Args:
        dtype: the precision in which it computes.
        ahead: whether it is released before training. It then keeps the precision of its files, and computes in fp32
            layer by layer (text_encoders.compute_in_fp32). The published files are in half precision.
    """
    stored = dtype
    if ahead and dtype is torch.float32:
        name = configuration.get("dtype") or "bfloat16"
        stored = getattr(torch, str(name).removeprefix("torch."))
    encoder = to_dtype(_build(part, configuration), stored)
    if stored is not dtype:
        text_encoders.compute_in_fp32(encoder)
    return encoder


def count_trained_weights(recipe: Recipe) -> int:
    """Return the number of weights that the recipe trains."""
    return sum(parameter.numel() for parameter in _trained_skeleton(recipe).parameters() if parameter.requires_grad)


def describe_adapter(recipe: Recipe) -> list[str]:
    """Return lines that say how many layers get an adapter, and how many of them each pattern of the recipe matches.

    Raises:
        UserError: a pattern matches no layer.
    """
    return lora.describe(_trained_skeleton(recipe), recipe.method)


def _trained_skeleton(recipe: Recipe) -> TrainedModel:
    with fake_tensors():
        parts = build_skeleton(recipe)
        model = trained_model(parts, recipe)
        if recipe.method.low_rank:
            model.add_adapters(recipe)
        else:
            model.requires_grad_(True)
        for module in parts.family.untrainable(parts.denoiser, parts.encoders):
            module.requires_grad_(False)
    return model


def without_xformers(recipe: Recipe) -> Recipe:
    """Return the recipe with sdpa in place of xformers, which is not installed everywhere.

    PyTorch's memory-efficient attention kernel comes from xformers and needs the same memory, so the prediction is the
    same.
    """
    if recipe.attention.kind is AttentionKind.xformers:
        return replace(recipe, attention=replace(recipe.attention, kind=AttentionKind.sdpa))
    return recipe


@cache
def _read_configurations(family: Family, folder: Path, vae_source: str | None,
                         ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the configurations of the parts by name, and the configuration of the scheduler.

    Args:
        vae_source: a folder, hub id or single file of the VAE that replaces the model's own; None: its own.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    configurations = {part.name: part.configuration(folder, subfolder=part.name) for part in family.parts()}
    if vae_source:
        configurations[family.vae.name] = vae.planned_configuration(
            vae_source, family, configurations[family.vae.name])
    return configurations, dict(DDPMScheduler.load_config(folder, subfolder="scheduler"))
