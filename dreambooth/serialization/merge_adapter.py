"""Merges an adapter that a run exported into its base model, for `python -m dreambooth.convert`.

Every program reads the result, also if it reads no adapter of this kind.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from dreambooth.errors import UserError
from dreambooth.models import hub, vae
from dreambooth.models.components import Components
from dreambooth.models.lora import Adapter
from dreambooth.serialization import embedding_files, export_layout, lora_files
from dreambooth.serialization.load_parts import load_other_parts, load_parts
from dreambooth.utils.assets import resolve_asset


def find_lone_adapter(source: Path) -> Path | None:
    """Return the adapter file of a run folder or exported folder that holds no model of its own; else None."""
    if not source.is_dir() or any((folder / export_layout.INDEX).is_file() for folder in (source / "model", source)):
        return None
    return export_layout.locate_adapter(source)


def load_merged(file: Path, dtype: torch.dtype | None, whole: bool) -> Components:
    """Load the base model of an adapter, and merge the adapter and its new tokens into it. Sums are computed in fp32.

    Args:
        file: the adapter in diffusers' layout.
        dtype: precision of all weights; None: the precision of each weight in the base model.
        whole: whether to load all parts; False: only those that a single file of the family contains.

    Raises:
        UserError: the base model is not on this machine, or does not fit the adapter; or embeddings are missing.
    """
    export_layout.check_intact(file.parent)
    adapters = lora_files.read(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    if "base_model" not in metadata:
        raise UserError(f"{file} does not say of which model it is: type in=runs/NAME, a run of this package")
    base, settings = lora_files.read_base_model(file), lora_files.read_base_settings(file)
    folder = _base_folder(base, settings.get("revision"), settings.get("variant"))
    parts = load_parts(folder)
    if whole and not parts.family.single_file.whole:
        parts = load_other_parts(parts, folder, "in=DIR")
    if other := settings.get("vae"):
        parts.vae = vae.load_for_pipeline(resolve_asset(other), parts.family, dtype or torch.float32)
    if settings.get("zero_terminal_snr"):
        parts.scheduler_config = parts.family.rescale_to_zero_snr(parts.scheduler_config)
    if dtype is not None:
        for module in parts.modules:
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.to(dtype)
    _merge(parts, adapters, file)
    embedding_files.merge_into(parts, file)
    return parts


@torch.no_grad()
def _merge(parts: Components, adapters: Mapping[str, Adapter], file: Path) -> None:
    layers = {parts.family.published_name(f"{part}.{name}"): layer for part, module in parts.modules_by_name.items()
              for name, layer in module.named_modules()}
    if missing := [name for name in adapters if name not in layers]:
        raise UserError(f"the base model of {file} lacks {missing[0]}: put back the model that it was trained on")
    for name, adapter in adapters.items():
        weight = layers[name].weight
        weight.copy_(adapter.merged(weight.float()))


def _base_folder(base: str, revision: str | None, variant: str | None) -> Path:
    source = resolve_asset(base)
    if hub.is_local(source):
        if not Path(source).is_dir():
            raise UserError(f"the base model {source} of the adapter is not on this machine: put it back")
        return Path(source)
    try:
        return Path(hub.download_pipeline(source, revision, variant, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(f"the base model {source} of the adapter is not on this machine ({hub.first_line(error)}): "
                        "draw a picture with the run, which downloads it, and repeat this command") from error
