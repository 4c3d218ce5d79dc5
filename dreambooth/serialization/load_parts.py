"""Builds the parts of a local diffusers folder from its configurations alone, or loads them with their weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models import families, text_encoders
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family
from dreambooth.serialization.detect_format import DetectedModel

CONFIG_HINT = "config=DIR"  # what a user of `python -m dreambooth.convert` types to name the folder of other parts


def build_parts(folder: Path, detected: DetectedModel | None = None, config_hint: str = CONFIG_HINT) -> Components:
    """Build parts on the device `meta`, without memory for weights, from the configurations of a diffusers folder.

    Args:
        folder: the diffusers folder.
        detected: a single file's family, prediction type, resolution and noise schedule, which replace those of the
            folder; None: keep those of the folder.
        config_hint: what error messages tell the user to type in order to name another folder; only with `detected`.

    Raises:
        UserError: the folder does not exist or lacks a configuration, or its model belongs to no supported family.
    """
    advice = f"type {config_hint}, another folder" if detected else "type another in=DIR"
    if not folder.is_dir():  # otherwise the libraries would look for a hub id of this name
        raise UserError(f"there is no folder {folder}: {advice}")
    try:
        family = detected.family if detected else families.of_folder(folder)
        if family is None:
            raise ValueError(f"it is no model of {families.titles()}")
        configurations = {part.name: part.configuration(folder, subfolder=part.name) for part in family.parts()}
        scheduler = read_json(folder / "scheduler/scheduler_config.json")
        if detected:
            latent_side = detected.resolution // family.vae_scale(configurations[family.vae.name])
            name = family.denoiser.name
            configurations[name] = family.with_native_side(configurations[name], latent_side)
            scheduler = scheduler | family.single_file.scheduler_changes(detected.prediction_type)
            scheduler = family.rescale_to_zero_snr(scheduler) if detected.is_rescaled else scheduler
        tokenizers = [family.load_tokenizer(name, folder) if (folder / name).is_dir()
                      else family.packaged_tokenizer(name) for name in family.tokenizers]
        with torch.device("meta"):
            modules = {part.name: part.build(configurations[part.name]) for part in family.parts()}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no diffusers folder of this family ({str(error).splitlines()[0][:120]}): "
                        f"{advice}") from error
    return Components(
        family=family, denoiser=modules[family.denoiser.name], vae=modules[family.vae.name],
        encoders=[modules[part.name] for part in family.encoders], tokenizers=tokenizers, scheduler_config=scheduler)


def load_parts(folder: Path) -> Components:
    """Load the parts of a local diffusers folder that a single file of the family contains.

    The other parts are on the device `meta`. Each weight keeps the precision in which it is stored.

    Raises:
        UserError: the folder lacks a part, or its model belongs to no supported family.
    """
    parts = build_parts(folder)
    for name, module in parts.modules_by_name.items():
        if parts.family.single_file.whole or module is parts.denoiser:
            _load_module(folder, name, module, parts.family, "type another in=DIR")
    return parts


def load_other_parts(parts: Components, folder: Path, config_hint: str) -> Components:
    """Return `parts` with the VAE and the text encoders of a local diffusers folder, in the precision of its files.

    Args:
        config_hint: what error messages tell the user to type in order to name another folder.

    Raises:
        UserError: the folder lacks a part.
    """
    advice = f"type {config_hint}, another folder"
    _load_module(folder, parts.family.vae.name, parts.vae, parts.family, advice)
    try:
        encoders = text_encoders.load(str(folder), parts.family, "auto", local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the text encoders in {folder} could not be loaded ({str(error).splitlines()[0][:120]}): "
                        f"{advice}") from error
    return replace(parts, encoders=encoders)


def _load_module(folder: Path, name: str, module: Any, family: Family, advice: str) -> None:
    """Load the weights of a part on the device `meta`, whose name is `name`, from a diffusers folder.

    Args:
        advice: what the error message tells the user to type.
    """
    paths = sorted((folder / name).glob("*.safetensors"))
    plain = [path for path in paths if ".fp16." not in path.name] or paths
    names = module.state_dict().keys()
    state = {family.current_name(key, names): value
             for path in plain for key, value in _load_weights(path).items() if not key.endswith("position_ids")}
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder / name} does not hold the .safetensors weights of its config.json "
                        f"({str(error).splitlines()[-1].strip()[:120]}): {advice}") from error


def _load_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or one of Git LFS's notes in its place ({error}): fetch it again, or type "
                        "git lfs pull where it was cloned") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        OSError, ValueError: the file cannot be read or contains no JSON object.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains no JSON object")
    return content
