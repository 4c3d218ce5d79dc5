"""The parts of a model out of one file in the original layout, and the file out of parts. Names: layout.py."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models.components import Components
from dreambooth.serialization.detect_format import Opened
from dreambooth.serialization.ldm_keys import (
    POSITIONS,
    PREFIX,
    UNREAD,
    VAE,
    ZERO,
    Entry,
    Family,
    Form,
    V,
    entries,
    modern,
)
from dreambooth.utils import atomic_files

ARCHITECTURE = {Family.sd1: "stable-diffusion-v1", Family.sd2: "stable-diffusion-v2-768-v",
                Family.sdxl: "stable-diffusion-xl-v1-base"}
IMPLEMENTATION = {Family.sd1: "https://github.com/CompVis/stable-diffusion",
                  Family.sd2: "https://github.com/Stability-AI/stablediffusion", Family.sdxl: "sgm"}


def modules(parts: Components) -> Iterator[tuple[str, Any]]:
    """Everything with weights, by name."""
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (module := getattr(parts, name)) is not None:
            yield name, module


def all_entries(parts: Components, family: Family) -> Iterator[Entry]:
    """The entries of all parts."""
    for name, module in modules(parts):
        layers = getattr(module.config, "layers_per_block", 2)
        yield from entries(family, name, module.state_dict(), layers)


def fill(parts: Components, file: Opened, family: Family) -> list[str]:
    """Give parts, built without memory, the weights of a file; returns keys of the file that are not of the model.

    Raises:
        UserError: the file's shapes are not those of the parts.
    """
    states: dict[str, dict[str, Tensor]] = {name: {} for name, _ in modules(parts)}
    shapes = {name: {key: tuple(value.shape) for key, value in module.state_dict().items()}
              for name, module in modules(parts)}
    left = set(file.names)
    for entry in all_entries(parts, family):
        if entry.original not in file.names:
            raise UserError(f"{file.path} lacks {entry.original}: it is cut short, or of another architecture; "
                            "type config=DIR, a diffusers folder of that architecture")
        left.discard(entry.original)
        there = file.read(entry.original)
        if entry.form is Form.convolution and there.dim() == 2:
            there = there[:, :, None, None]
        wanted = entry.shape([shapes[entry.part][name] for name in entry.names])
        if tuple(there.shape) != wanted:
            raise UserError(f"{file.path}: {entry.original} is {tuple(there.shape)} and not {wanted}: it is of another "
                            "architecture; type config=DIR, a diffusers folder of that architecture")
        states[entry.part].update(zip(entry.names, _here(entry, there), strict=True))
    for name, module in modules(parts):
        module.load_state_dict(states[name], assign=True)
    after = len(getattr(parts.text_encoder, "text_model", parts.text_encoder).encoder.layers)
    unread = f"cond_stage_model.model.transformer.resblocks.{after}."  # 2.x: the last layer, which it does not look at
    return sorted(name for name in left if not UNREAD.fullmatch(name) and not name.startswith(unread))


def only_vae(vae: Any, file: Opened) -> None:
    """Give a VAE, built without memory, the weights of a file of a VAE alone, or of a whole model; in either layout.

    Raises:
        UserError: it holds no VAE of this shape.
    """
    names = list(vae.state_dict())
    known = frozenset(names)
    theirs = {modern(name, known): name for name in file.names}  # in the layout of a folder
    prefix = VAE if any(name.startswith(VAE) for name in file.names) else ""
    state: dict[str, Tensor] = {}
    try:
        for entry in entries(Family.sd1, "vae", names, vae.config.layers_per_block):
            if entry.names[0] in theirs:
                state[entry.names[0]] = file.read(theirs[entry.names[0]])
                continue
            there = file.read(prefix + entry.original.removeprefix(VAE))
            state[entry.names[0]] = _here(entry, there)[0]
        vae.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file.path} holds no VAE of this architecture ({str(error).splitlines()[0][:120]}): type "
                        "another file") from error


def write(parts: Components, path: Path, dtype: torch.dtype | None, with_vae: bool, facts: Mapping[str, str]) -> int:
    """Write one .safetensors in the original layout; returns how many tensors it holds.

    Args:
        dtype: of every weight; None: as they are.
        facts: metadata; `modelspec.` keys are completed (Stability-AI/ModelSpec 1.0.0).

    Raises:
        UserError: the model predicts what no such file can say.
    """
    family, marks = family_of(parts), _marks(parts)
    states = {name: module.state_dict() for name, module in modules(parts)}
    tensors: dict[str, Tensor] = {}
    for entry in all_entries(parts, family):
        if entry.part == "vae" and not with_vae:
            continue
        there = _there(entry, [states[entry.part][name] for name in entry.names])
        tensors[entry.original] = there.detach().cpu().to(dtype or there.dtype).contiguous()
    tensors |= {mark: torch.empty(0, dtype=dtype or torch.float32) for mark in marks}
    if family is not Family.sd2:
        count = parts.text_encoder.config.max_position_embeddings
        tensors[PREFIX[family]["text_encoder"] + POSITIONS] = torch.arange(count)[None]
    with atomic_files.whole_file(path) as aside:
        save_file(tensors, aside, metadata=_modelspec(parts, family, V in marks) | dict(facts))
    return len(tensors)


def family_of(parts: Components) -> Family:
    """Which layout the parts are written in: with one text encoder, OpenCLIP's (2.x) is told by its activation."""
    if parts.text_encoder_2 is not None:
        return Family.sdxl
    return Family.sd2 if parts.text_encoder.config.hidden_act == "gelu" else Family.sd1


def _marks(parts: Components) -> set[str]:
    """By which programs that open the file know what it predicts and at which noise; ComfyUI reads them of SDXL."""
    kind = parts.scheduler_config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"this model predicts {kind}, which a file of this layout cannot say: type in=DIR, a model "
                        "that predicts noise (epsilon) or v (v_prediction)")
    zero = bool(parts.scheduler_config.get("rescale_betas_zero_snr"))
    return {mark for mark, there in ((V, kind == "v_prediction"), (ZERO, zero)) if there}


def _modelspec(parts: Components, family: Family, v: bool) -> dict[str, str]:
    side = parts.unet.config.sample_size * parts.vae_scale
    architecture = "stable-diffusion-v2-512" if family is Family.sd2 and not v else ARCHITECTURE[family]
    return {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture,
            "modelspec.implementation": IMPLEMENTATION[family],
            "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "modelspec.resolution": f"{side}x{side}", "modelspec.prediction_type": "v" if v else "epsilon"}


def _here(entry: Entry, there: Tensor) -> Sequence[Tensor]:
    match entry.form:
        case Form.plain:
            return [there]
        case Form.convolution:
            return [there[:, :, 0, 0] if there.dim() == 4 else there]  # some tools write it as a linear layer
        case Form.stacked:
            return [part.clone() for part in there.chunk(len(entry.names))]
        case Form.turned:
            return [there.T.contiguous()]


def _there(entry: Entry, here: Sequence[Tensor]) -> Tensor:
    match entry.form:
        case Form.plain:
            return here[0]
        case Form.convolution:
            return here[0][:, :, None, None]
        case Form.stacked:
            return torch.cat(list(here))
        case Form.turned:
            return here[0].T
