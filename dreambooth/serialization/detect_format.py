"""Opens a model in one file and says what it is.

.safetensors is read tensor by tensor. A .ckpt is a pickle, a program: PyTorch runs none of it that does more than put
tensors together (weights_only=True), and a file that asks for more is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.serialization.ldm_keys import EDM, UNET, ZERO, Family, V

OLD_CLIP = re.compile(r"cond_stage_model\.transformer\.(?!text_model\.)")  # files that leave a level out
BASE_STEPS = 875000  # of the 2.x checkpoints that predict noise at 512 px, as diffusers tells them too
SIDES = r"(512|768)"  # in the name of a 2.x file


@dataclass(frozen=True)
class Opened:
    """A file that is open: tensors are read when they are asked for."""

    path: Path
    names: frozenset[str]
    read: Callable[[str], Tensor]
    facts: Mapping[str, str]  # its metadata, and a checkpoint's global_step


@dataclass(frozen=True)
class Found:
    """What a file was taken for, and by what."""

    family: Family
    prediction_type: str
    resolution: int
    zero_terminal_snr: bool  # as it is marked
    why: str  # it predicts that
    sized: str = ""  # and has that resolution

    @property
    def pure_noise(self) -> bool:
        """Whether its last timestep is: a model that predicts noise has nothing to predict there, and of one ComfyUI
        passes over the mark too."""
        return self.zero_terminal_snr and self.prediction_type == "v_prediction"


def opened(path: Path) -> Opened:
    """Open a model file.

    Raises:
        UserError: there is none, it is damaged, or it is a pickle that wants to run code.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: type the path of a .safetensors or .ckpt file")
    if path.suffix.lower() == ".safetensors":
        try:
            handle: Any = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): fetch it again") from error
        theirs = {_whole_name(name): name for name in handle.keys()}  # noqa: SIM118  it is no dict
        return Opened(path, frozenset(theirs), lambda name: handle.get_tensor(theirs[name]), handle.metadata() or {})
    content = _unpickled(path)
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, dict) or not any(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no weights: type the path of a Stable Diffusion checkpoint")
    known = {_whole_name(str(name)): value for name, value in tensors.items() if isinstance(value, Tensor)}
    steps = content.get("global_step")
    return Opened(path, frozenset(known), known.__getitem__, {"global_step": str(steps)} if steps is not None else {})


def _whole_name(name: str) -> str:
    return OLD_CLIP.sub("cond_stage_model.transformer.text_model.", name)


def _unpickled(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # an archive, or a pickle of protocol 2 and newer
            raise UserError(f"{path} is damaged (it does not begin as a checkpoint does): fetch it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; what it is about is only in its words
        wants = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if wants or re.search(r"Unsupported|Trying to|not allowed", str(error)):
            raise UserError(f"{path} is a pickle that wants more than weights ({wants[1] if wants else 'code'}), which "
                            "could be anything, and nothing of it was run: type a .safetensors file of the same "
                            "model") from error
        said = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is damaged ({said}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights: type the path of a Stable Diffusion checkpoint")
    return content


def recognised(file: Opened, prediction_type: str | None = None, resolution: int | None = None) -> Found:
    """What a file is. The family is by its keys; what keys do not show is by what was typed, metadata, marks, or the
    file's name.

    Raises:
        UserError: it is none of Stable Diffusion 1.x, 2.x, SDXL.
    """
    family = _family(file)
    if any(name.startswith(EDM) for name in file.names):
        raise UserError(f"{file.path} was trained with noise of another kind (EDM, as CosXL and Playground v2.5), that "
                        "nothing here knows: type another file")
    v, why = _predicts_v(file, family)
    if prediction_type:
        v, why = prediction_type == "v_prediction", "what you typed"
    noted = re.match(r"(\d+)x\d+$", file.facts.get("modelspec.resolution", ""))
    named = re.search(SIDES, file.path.stem)
    if resolution:
        side, sized = resolution, "what you typed"
    elif noted:
        side, sized = int(noted[1]), "its metadata"
    elif family is not Family.sd2:
        side, sized = {Family.sd1: 512, Family.sdxl: 1024}[family], "its keys"
    elif named and prediction_type:
        side, sized = int(named[1]), "its name"
    else:
        side, sized = 768 if v else 512, "what it predicts"
    return Found(family, "v_prediction" if v else "epsilon", side, ZERO in file.names, why, sized)


def _predicts_v(file: Opened, family: Family) -> tuple[bool, str]:
    """Whether it predicts v, and by what that is known."""
    kind = file.facts.get("modelspec.prediction_type", "")
    if family is not Family.sd2:
        return V in file.names or kind == "v", "its keys"
    if kind:
        return kind == "v", "its metadata"
    if V in file.names:
        return True, "its keys"
    if "global_step" in file.facts:
        return file.facts["global_step"] != str(BASE_STEPS), f"its {file.facts['global_step']} steps of training"
    if named := re.search(SIDES, file.path.stem):
        return named[1] == "768", "its name"
    return True, "what most files of Stable Diffusion 2 do (nothing in it says so)"


def _family(file: Opened) -> Family:
    names = file.names
    if f"{UNET}input_blocks.0.0.weight" not in names:
        inside = "a LoRA" if any("lora" in name for name in names) else "something else"
        raise UserError(f"{file.path} is {inside}, not a whole Stable Diffusion model in its original layout: type "
                        "another file, or a folder of diffusers")
    if any(name.startswith("conditioner.embedders.1.model.") for name in names):
        return Family.sdxl
    if any(name.startswith("cond_stage_model.model.") for name in names):
        return Family.sd2
    if any(name.startswith("cond_stage_model.transformer.") for name in names):
        return Family.sd1
    raise UserError(f"{file.path} has no text encoder that is known here (Stable Diffusion 1.x, 2.x, SDXL base): "
                    "type another file, or a folder of diffusers")
