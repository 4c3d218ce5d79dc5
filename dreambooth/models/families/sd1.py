"""Stable Diffusion 1.x: a UNet with 860 M weights and CLIP ViT-L as text encoder. It predicts noise at 512 px."""

import re

from dreambooth.models.families import clip_tokenizer
from dreambooth.models.families.family import Layout
from dreambooth.models.families.latent_unet import LatentUNet
from dreambooth.models.families.ldm_keys import LdmFormat

OLD_CLIP = re.compile(r"cond_stage_model\.transformer\.(?!text_model\.)")  # keys without the level text_model


class Sd1Format(LdmFormat):
    """Single files of Stable Diffusion 1.x."""

    text_key = "cond_stage_model.transformer."
    text_prefixes = {"text_encoder": "cond_stage_model."}
    side = 512
    architecture = "stable-diffusion-v1"
    implementation = "https://github.com/CompVis/stable-diffusion"

    def canonical_key(self, name: str) -> str:
        return OLD_CLIP.sub("cond_stage_model.transformer.text_model.", name)


class StableDiffusion1(LatentUNet):
    """Stable Diffusion 1.x, and models with the same architecture and other sizes."""

    title = "Stable Diffusion 1.x"
    architecture = "sd15"
    hub_ids = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5",
               "CompVis/stable-diffusion-v1-4")
    license = ("creativeml-openrail-m", "CreativeML Open RAIL-M")
    renamed_hub_ids = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
    extra_parts = {"safety_checker": 304_000_000}
    pad_tokens = {"tokenizer": clip_tokenizer.END}
    kohya_version = "sd_v1"
    single_file = Sd1Format()

    def matches(self, layout: Layout) -> bool:
        return ("unet" in layout.parts and "text_encoder_2" not in layout.parts
                and layout.configuration("text_encoder").get("hidden_act", "quick_gelu") != "gelu")


FAMILY = StableDiffusion1()
