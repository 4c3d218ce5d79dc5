"""Opens a model that is a single file, and detects what it is.

A .safetensors is read tensor by tensor. A .ckpt is a pickle, which is a program: PyTorch executes only what builds
tensors (weights_only=True), and a file that asks for more is refused.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models import families
from dreambooth.models.families.family import Family
from dreambooth.models.families.file_format import ModelFile

NO_WEIGHTS = "holds no weights: type the path of a model's checkpoint"


@dataclass(frozen=True)
class DetectedModel:
    """What a single file holds, and what that was concluded from."""

    family: Family
    prediction_type: str
    resolution: int
    zero_terminal_snr: bool  # as the file is marked
    prediction_reason: str
    resolution_reason: str = ""

    @property
    def is_rescaled(self) -> bool:
        """Whether the last timestep is pure noise. The mark is ignored, as by ComfyUI, for a model that predicts noise:
        it would have nothing to predict there."""
        return self.zero_terminal_snr and self.prediction_type == "v_prediction"


def open_model_file(path: Path) -> ModelFile:
    """Open a model file.

    Raises:
        UserError: it does not exist, is damaged, or is a pickle that wants to execute code.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: type the path of a .safetensors or .ckpt file")
    if path.suffix.lower() == ".safetensors":
        try:
            handle: Any = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): fetch it again") from error
        stored = {families.canonical_key(name): name for name in handle.keys()}  # noqa: SIM118  not a dict
        return ModelFile(path, frozenset(stored), lambda name: handle.get_tensor(stored[name]), handle.metadata() or {})
    content = _unpickle(path)
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, dict) or not any(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} {NO_WEIGHTS}")
    by_name = {families.canonical_key(str(name)): value for name, value in tensors.items() if isinstance(value, Tensor)}
    steps = content.get("global_step")
    return ModelFile(path, frozenset(by_name), by_name.__getitem__,
                     {"global_step": str(steps)} if steps is not None else {})


def _unpickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # an archive, or a pickle of protocol 2 or newer
            raise UserError(f"{path} is damaged (it does not begin as a checkpoint does): fetch it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types; only the message tells what is wrong
        wants = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if wants or re.search(r"Unsupported|Trying to|not allowed", str(error)):
            raise UserError(f"{path} is a pickle that wants more than weights ({wants[1] if wants else 'code'}), which "
                            "could be anything, and nothing of it was run: type a .safetensors file of the same "
                            "model") from error
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is damaged ({reason}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} {NO_WEIGHTS}")
    return content


def detect(file: ModelFile, prediction_type: str | None = None, resolution: int | None = None) -> DetectedModel:
    """Detect what a file holds: its family by its keys; what keys do not say by what the user typed, by metadata, and
    by the family's own rules.

    Raises:
        UserError: it is a model of no family here.
    """
    family = families.of_keys(file.names)
    if family is None:
        raise UserError(_unknown(file))
    layout = family.single_file
    layout.check(file)
    if prediction_type:
        kind, why = prediction_type, "what you typed"
    else:
        kind, why = layout.prediction_type(file)
    noted = re.match(r"(\d+)x\d+$", file.metadata.get("modelspec.resolution", ""))
    if resolution:
        side, side_why = resolution, "what you typed"
    elif noted:
        side, side_why = int(noted[1]), "its metadata"
    else:
        side, side_why = layout.resolution(file, kind, typed=bool(prediction_type))
    return DetectedModel(family, kind, side, layout.is_zero_terminal_snr(file), why, side_why)


def _unknown(file: ModelFile) -> str:
    """Return the message about a file of no family."""
    if any(family.single_file.denoiser_key in file.names for family in families.FAMILIES):
        return (f"{file.path} has no text encoder that is known here, those of {families.titles()}: type another file, "
                "or a folder of diffusers")
    content = "a LoRA" if any("lora" in name for name in file.names) else "something else"
    return (f"{file.path} is {content}, not a whole model of {families.titles()} in its original layout: type another "
            "file, or a folder of diffusers")
