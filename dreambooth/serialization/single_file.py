"""Reads and writes single files: one file with all parts of a model in its family's layout (SingleFileFormat).

Files of some families contain the denoiser alone (SingleFileFormat.whole).
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models import families
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family
from dreambooth.models.families.file_format import Entry, Form, ModelFile
from dreambooth.models.finite import first_not_finite
from dreambooth.utils import atomic_files


def all_entries(parts: Components) -> Iterator[Entry]:
    """Yield an Entry for each tensor of a single file that contains these parts."""
    for name, module in parts.modules_by_name.items():
        yield from parts.family.single_file.entries(name, module.state_dict(), module.config)


def fill(parts: Components, file: ModelFile, config_hint: str) -> list[str]:
    """Load the weights of a single file into parts on the device `meta`: all parts, or the denoiser alone.

    Args:
        config_hint: what error messages tell the user to type in order to name a folder of another architecture.

    Returns:
        The keys of the file that belong to no part, without the keys that a model of the family never needs
        (`is_ignored`).

    Raises:
        UserError: the file lacks a tensor, or a tensor has another shape than in the parts or is in 8 bits.
    """
    modules = parts.modules_by_name
    if not parts.family.single_file.whole:
        modules = {parts.family.denoiser.name: parts.denoiser}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    shapes = {name: {key: tuple(value.shape) for key, value in module.state_dict().items()}
              for name, module in modules.items()}
    left = set(file.names)
    for entry in all_entries(parts):
        key = families.canonical_key(entry.key)
        if key not in file.names:
            raise UserError(f"{file.path} lacks {entry.key}: it is cut short, or of another architecture; "
                            f"type {config_hint}, a diffusers folder of that architecture")
        left.discard(key)
        tensor = file.read(key)
        if tensor.element_size() < 2:
            raise UserError(f"{file.path} is in 8 bits ({entry.key} is {str(tensor.dtype).removeprefix('torch.')}): "
                            "type a file of the same model in bf16, fp16 or fp32")
        if entry.form is Form.convolution and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        expected = entry.shape([shapes[entry.part][name] for name in entry.names])
        if tuple(tensor.shape) != expected:
            raise UserError(f"{file.path}: {entry.key} is {tuple(tensor.shape)} and not {expected}: it is of another "
                            f"architecture; type {config_hint}, a diffusers folder of that architecture")
        states[entry.part].update(zip(entry.names, _from_file(entry, tensor), strict=True))
    for name, module in modules.items():
        module.load_state_dict(states[name], assign=True)
    return sorted(key for key in left if not parts.family.single_file.is_ignored(key, parts.encoders))


def fill_vae(vae: Any, family: Family, file: ModelFile) -> None:
    """Load the weights of `vae`, a VAE on the device `meta`, from a single file.

    The file may contain a VAE alone or a whole model, in the family's original layout or in diffusers' layout.

    Raises:
        UserError: the file contains no VAE of this architecture, or the family's VAE is read from folders only.
    """
    if not family.single_file.whole:
        raise UserError(f"{file.path} is a single file, and a VAE of {family.title} is read from folders alone: leave "
                        "it out")
    names = list(vae.state_dict())
    known = frozenset(names)
    diffusers_keys = {family.current_name(key, known): key for key in file.names}
    prefix = family.single_file.vae_prefix
    stored_prefix = prefix if any(key.startswith(prefix) for key in file.names) else ""
    state: dict[str, Tensor] = {}
    try:
        for entry in family.single_file.entries(family.vae.name, names, vae.config):
            [name] = entry.names
            if name in diffusers_keys:
                state[name] = file.read(diffusers_keys[name])
                continue
            tensor = file.read(stored_prefix + entry.key.removeprefix(prefix))
            [state[name]] = _from_file(entry, tensor)
        vae.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file.path} holds no VAE of this architecture ({str(error).splitlines()[0][:120]}): type "
                        "another file") from error


def write(parts: Components, path: Path, dtype: torch.dtype | None, with_vae: bool, metadata: Mapping[str, str]) -> int:
    """Write a .safetensors file in the family's original layout; return the number of its tensors.

    Args:
        dtype: precision of the written weights; None: their present precision.
        with_vae: whether the file contains the VAE.
        metadata: metadata of the file. It overrides the `modelspec.` keys that are derived from the model
            (Stability-AI/ModelSpec 1.0.0).

    Raises:
        UserError: the family's original layout cannot represent the model's prediction type, or a weight is not finite.
    """
    layout = parts.family.single_file
    marks = layout.marks_of(parts.scheduler_config)
    states = {name: module.state_dict() for name, module in parts.modules_by_name.items()}
    tensors: dict[str, Tensor] = {}
    for entry in all_entries(parts):
        if entry.part == parts.family.vae.name and not with_vae:
            continue
        tensor = to_file(entry, [states[entry.part][name] for name in entry.names])
        tensors[entry.key] = tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
    check_finite(tensors)
    tensors |= {mark: torch.empty(0, dtype=dtype or torch.float32) for mark in marks}
    tensors |= layout.constants(parts.encoders)
    with atomic_files.write_file(path) as aside:
        save_file(tensors, aside, metadata=_modelspec(parts) | dict(metadata))
    return len(tensors)


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Check the weights of a model that is about to be written.

    Raises:
        UserError: a weight is NaN or infinite, for example because its value exceeds the range of fp16.
    """
    if name := first_not_finite(weights):
        raise UserError(f"the weight {name} is not finite in {str(weights[name].dtype).removeprefix('torch.')}: type "
                        "dtype=fp32 if it was converted to fp16, else in= another model")


def _modelspec(parts: Components) -> dict[str, str]:
    side = parts.family.native_side(parts.denoiser, parts.vae, parts.vae_scale)
    prediction_type = parts.scheduler_config.get("prediction_type", "epsilon")
    return {"modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "modelspec.resolution": f"{side}x{side}"} | parts.family.single_file.modelspec(prediction_type)


def _from_file(entry: Entry, tensor: Tensor) -> Sequence[Tensor]:
    """Convert a tensor of a single file, which `entry` describes, to the same weights in a diffusers folder."""
    match entry.form:
        case Form.plain:
            return [tensor]
        case Form.convolution:
            return [tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor]  # some tools write a linear layer
        case Form.stacked:
            return [part.clone() for part in tensor.chunk(len(entry.names))]
        case Form.transposed:
            return [tensor.T.contiguous()]
        case Form.swapped:
            return [_swap_halves(tensor)]


def to_file(entry: Entry, tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensor that `entry` describes, computed from the tensors of a diffusers folder."""
    match entry.form:
        case Form.plain:
            return tensors[0]
        case Form.convolution:
            return tensors[0][:, :, None, None]
        case Form.stacked:
            return torch.cat(list(tensors))
        case Form.transposed:
            return tensors[0].T
        case Form.swapped:
            return _swap_halves(tensors[0])


def _swap_halves(tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` with the first and the second half of its rows swapped."""
    return torch.cat(tensor.chunk(2)[::-1])
