"""Metadata for PNG files: the prompt, the seed, the LoRAs and other settings of a generated picture.

The entry `parameters` has the format that AUTOMATIC1111 writes and reads ("PNG Info"). The entry `dreambooth` contains
all settings as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.PngImagePlugin import PngInfo

import dreambooth


def info(prompt: str, seed: int, size: tuple[int, int], loras: Sequence[tuple[str, float]],
         settings: Mapping[str, Any]) -> PngInfo:
    """Return the metadata entries for one picture.

    Args:
        size: width and height in pixels.
        loras: (name, scale) of each LoRA.
        settings: a dictionary with the keys num_inference_steps, sampler, guidance_scale, negative_prompt, model and
            strength; the strength is None if there is no start picture.
    """
    entries = PngInfo()
    entries.add_text("parameters", parameters(prompt, seed, size, loras, settings))
    everything = {"prompt": prompt, "seed": seed, "width": size[0], "height": size[1],
                  "loras": [{"name": name, "scale": scale} for name, scale in loras],
                  **settings, "version": dreambooth.__version__}
    entries.add_text("dreambooth", json.dumps(everything))
    return entries


def parameters(prompt: str, seed: int, size: tuple[int, int], loras: Sequence[tuple[str, float]],
               settings: Mapping[str, Any]) -> str:
    """Return the text of the entry `parameters`, for the same arguments as `info`.

    The first line is the prompt with its LoRAs. If there is a negative prompt, it is the second line. The last line
    contains the other settings.
    """
    lines = [" ".join([prompt, *(f"<lora:{name}:{scale:g}>" for name, scale in loras)])]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    facts = {
        "Steps": settings["num_inference_steps"], "Sampler": settings["sampler"],
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": seed, "Size": f"{size[0]}x{size[1]}", "Model": settings["model"],
    }
    if settings["strength"] is not None:
        facts["Denoising strength"] = f"{settings['strength']:g}"
    facts["Version"] = f"dreambooth {dreambooth.__version__}"
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in facts.items())])
