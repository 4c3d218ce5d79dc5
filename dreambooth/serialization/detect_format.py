"""Opens a single-file model, and detects its family, prediction type and resolution.

A .safetensors file is read tensor by tensor. A .ckpt file is a pickle, which checkpoint_pickle.py reads.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models import families
from dreambooth.models.families.family import Family
from dreambooth.models.families.file_format import ModelFile
from dreambooth.serialization import checkpoint_pickle

NO_WEIGHTS = "holds no weights: type the path of a model's checkpoint"


@dataclass(frozen=True)
class DetectedModel:
    """The family and properties of a model in a single file, and the evidence for them in words."""

    family: Family
    prediction_type: str
    resolution: int
    zero_terminal_snr: bool  # whether the file has this mark
    prediction_reason: str
    resolution_reason: str = ""

    @property
    def is_rescaled(self) -> bool:
        """Whether the noise schedule is rescaled, so that the last timestep is pure noise.

        A mark in the file says so (`zero_terminal_snr`). As in ComfyUI, the mark is ignored if the model predicts
        noise: at a timestep whose input is pure noise, such a model has nothing to predict.
        """
        return self.zero_terminal_snr and self.prediction_type == "v_prediction"


def open_model_file(path: Path) -> ModelFile:
    """Open a single-file model.

    Raises:
        UserError: the file does not exist, is damaged, contains no weights, is a pickle that contains code, or would
            be much larger when unpacked.
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
    content = checkpoint_pickle.read(path)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not any(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} {NO_WEIGHTS}")
    by_name = {families.canonical_key(str(name)): value for name, value in tensors.items() if isinstance(value, Tensor)}
    steps = content.get("global_step")
    return ModelFile(path, frozenset(by_name), by_name.__getitem__,
                     {"global_step": str(steps)} if steps is not None else {})


def detect(file: ModelFile, prediction_type: str | None = None, resolution: int | None = None) -> DetectedModel:
    """Detect the family, prediction type and resolution of a single-file model.

    The keys of the file determine the family. A value that the user typed takes precedence. Without it, the file's
    metadata and rules of the family determine prediction type and resolution.

    Args:
        prediction_type, resolution: values that the user typed; None: not typed.

    Raises:
        UserError: the file contains no model of a supported family.
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
    """Return the error message for a file whose model belongs to no supported family."""
    if any(family.single_file.denoiser_key in file.names for family in families.FAMILIES):
        return (f"{file.path} is of no model that is known here, those of {families.titles()}: type another file, or a "
                "folder of diffusers")
    content = "a LoRA" if any("lora" in name for name in file.names) else "something else"
    return (f"{file.path} is {content}, not a model of {families.titles()} in its original layout: type another file, "
            "or a folder of diffusers")
