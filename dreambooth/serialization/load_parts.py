"""The parts of a local diffusers folder: by their shapes alone, or with their weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.models.components import Components, zero_snr
from dreambooth.serialization import clip_tokenizer, single_file
from dreambooth.serialization.detect_format import Found
from dreambooth.serialization.ldm_keys import Family, modern


def blank_parts(folder: Path, found: Found | None) -> Components:
    """Parts without memory, built from the configurations of a folder and told what was found in a file.

    Raises:
        UserError: the folder lacks one.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    try:
        vae, unet = (read_json(folder / part / "config.json") for part in ("vae", "unet"))
        schedule = read_json(folder / "scheduler/scheduler_config.json")
        pad = "!" if found and found.family is Family.sd2 else clip_tokenizer.END
        two = found.family is Family.sdxl if found else (folder / "text_encoder_2").is_dir()
        if found:
            unet["sample_size"] = found.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
            schedule = _schedule(schedule, found)
        with torch.device("meta"):
            parts = Components(
                unet=UNet2DConditionModel.from_config(unet), vae=AutoencoderKL.from_config(vae),
                text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")),
                tokenizer=_tokenizer(folder, "tokenizer", pad),
                scheduler_config=schedule)
            if two:
                parts.text_encoder_2 = CLIPTextModelWithProjection(
                    CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2"))
                parts.tokenizer_2 = _tokenizer(folder, "tokenizer_2", "!")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no diffusers folder of this family ({str(error).splitlines()[0][:120]}): type "
                        f"another {'config' if found else 'in'}=DIR") from error
    return parts


def _schedule(config: dict[str, Any], found: Found) -> dict[str, Any]:
    config = config | {"prediction_type": found.prediction_type}
    return zero_snr(config) if found.pure_noise else config


def _tokenizer(folder: Path, name: str, pad: str) -> Any:
    if not (folder / name).is_dir():
        return clip_tokenizer.tokenizer(pad)
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, subfolder=name)


def open_parts(folder: Path) -> Components:
    """The parts of a local diffusers folder, each weight in the precision in which it is kept.

    Raises:
        UserError: it lacks one.
    """
    parts = blank_parts(folder, None)
    for name, module in single_file.modules(parts):
        paths = sorted((folder / name).glob("*.safetensors"))
        plain = [path for path in paths if ".fp16." not in path.name] or paths
        known = module.state_dict().keys()
        state = {modern(key, known): value for path in plain for key, value in _weights(path).items()
                 if not key.endswith("position_ids")}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"{folder / name} does not hold the .safetensors weights of its config.json "
                            f"({str(error).splitlines()[-1].strip()[:120]}): type another in=DIR") from error
    return parts


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or one of Git LFS's notes in its place ({error}): fetch it again, or type "
                        "git lfs pull where it was cloned") from error


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
