"""Stable Diffusion XL base (Podell et al. 2023, arXiv:2307.01952).

It has a UNet with 2.6 billion weights and two text encoders, CLIP ViT-L and OpenCLIP ViT-bigG. It predicts noise at
1024 px.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.models.families import clip_text, clip_tokenizer
from dreambooth.models.families.family import Layout
from dreambooth.models.families.latent_unet import LatentUNet
from dreambooth.models.families.ldm_keys import UNET, LdmFormat

if TYPE_CHECKING:
    from torch import Tensor, nn

MICRO_CONDITIONS = 6  # number of values that describe a picture's size and crop to the UNet


class SdxlFormat(LdmFormat):
    """Single files of SDXL."""

    text_key = "conditioner.embedders.1.model."
    text_prefixes = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1.model."}
    openclip = frozenset({"text_encoder_2"})
    side = 1024
    architecture = "stable-diffusion-xl-v1-base"
    implementation = "sgm"


class StableDiffusionXL(LatentUNet):
    """SDXL base, and models with the same architecture and other sizes.

    The token ids of P prompts have the shape (P, 2, L), and the output of `text` has the shape (P, L + 1, D1 + D2). The
    first L rows of this output are the concatenated hidden states of both encoders before their last layers (section 2
    of the paper). The last row contains the pooled and projected state of the second encoder, followed by zeros.

    The UNet also receives the original size of the picture, the coordinates of its crop, and the target size (section
    2.2). In training, the UNet receives the values of each photo, so that the model does not learn crops and low
    resolution as part of the subject. To generate pictures, diffusers' pipeline sets original size and target size to
    the size of the picture, and the crop to (0, 0).
    """

    title = "SDXL"
    architecture = "sdxl"
    hub_ids = ("stabilityai/stable-diffusion-xl-base-1.0",)
    license = ("openrail++", "CreativeML Open RAIL++-M")
    encoders = (clip_text.FIRST, clip_text.SECOND)
    tokenizers = ("tokenizer", "tokenizer_2")
    embedding_keys = ("clip_l", "clip_g")
    pad_tokens = {"tokenizer": clip_tokenizer.END, "tokenizer_2": "!"}
    pipeline_module = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"
    pipeline_name = "StableDiffusionXLPipeline"
    kohya_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    kohya_version = "sdxl_base_v1-0"
    kohya_implementation = "https://github.com/Stability-AI/generative-models"
    half_safe_vaes = ("madebyollin/sdxl-vae-fp16-fix",)  # SDXL's VAE, fine-tuned so that it does not overflow in fp16
    uses_size_and_crop = True
    activations_gib = {True: 0.08, False: 3.0}  # its attention is deeper; the planner predicts 0.08 and 3.1 at 1024 px
    single_file = SdxlFormat()

    def matches(self, layout: Layout) -> bool:
        return "unet" in layout.parts and "text_encoder_2" in layout.parts

    # -- prompts to conditions -------------------------------------------------------------------------------------

    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        import torch

        return torch.stack([clip_text.tokenize(tokenizer, prompt) for tokenizer in tokenizers], 1)

    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        return torch.zeros(count, len(encoders), encoders[0].config.max_position_embeddings, dtype=torch.long)

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        first = encoders[0](tokens[:, 0], output_hidden_states=True)
        second = encoders[1](tokens[:, 1], output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        pooled: Tensor = second.text_embeds
        row = F.pad(pooled, (0, states.shape[-1] - pooled.shape[-1])).unsqueeze(1)
        return torch.cat([states, row.to(states.dtype)], 1)

    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        width = sum(encoder.config.hidden_size for encoder in encoders)
        return torch.empty(count, encoders[0].config.max_position_embeddings + 1, width)

    def untrainable(self, denoiser: Any, encoders: Sequence[Any]) -> list[nn.Module]:
        """Return the last layer and norm of the first encoder, because `text` uses the hidden states before them."""
        inside = getattr(encoders[0], "text_model", encoders[0])
        return [inside.encoder.layers[-1], inside.final_layer_norm]

    # -- the denoiser ----------------------------------------------------------------------------------------------

    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, text: Tensor, vae_scale: int,
                size_and_crop: Tensor | None = None) -> Tensor:
        import torch

        config = denoiser.config
        numbers = MICRO_CONDITIONS * config.addition_time_embed_dim
        pooled = text[:, -1, :config.projection_class_embeddings_input_dim - numbers]
        if size_and_crop is None:
            height, width = (float(side * vae_scale) for side in latents.shape[-2:])
            sizes = [latents.new_full((len(latents),), side) for side in (height, width, 0.0, 0.0, height, width)]
            size_and_crop = torch.stack(sizes, 1)
        added = {"text_embeds": pooled, "time_ids": size_and_crop}
        prediction: Tensor = denoiser(latents, timesteps, text[:, :-1], added_cond_kwargs=added, return_dict=False)[0]
        return prediction

    # -- adapters --------------------------------------------------------------------------------------------------

    def kohya_names(self, names: Collection[str], denoiser_config: Any) -> dict[str, str]:
        """Return the keys. As in kohya's trainer, the UNet's keys are derived from the UNet's names in single files.

        With keys derived from diffusers' names, AUTOMATIC1111 does not find every layer, such as the first upsampler.
        """
        part = self.denoiser.name
        weights = [f"{name.removeprefix(f'{part}.')}.weight" for name in names if name.startswith(f"{part}.")]
        keys = {f"{part}.{entry.names[0].removesuffix('.weight')}": entry.key.removeprefix(UNET).removesuffix(".weight")
                for entry in self.single_file.entries(part, weights, denoiser_config)}
        return super().kohya_names(names, denoiser_config) | {
            name: self.kohya_prefixes[part] + key.replace(".", "_") for name, key in keys.items()}

    # -- pixels to latents -----------------------------------------------------------------------------------------

    def half_overflows(self, vae_configuration: Mapping[str, Any]) -> bool:
        """Return the value of `force_upcast` in the VAE's configuration.

        It is true for the published VAE, which overflows in fp16. It is false for the VAE that was fine-tuned so that
        it does not overflow.
        """
        return bool(vae_configuration.get("force_upcast", True))

    # -- pipelines -------------------------------------------------------------------------------------------------

    def build_pipeline(self, parts: Mapping[str, Any], scheduler: Any) -> Any:
        pipeline_parts = {name: part for name, part in parts.items() if name != "safety_checker"}
        return self.pipeline_type(**{"feature_extractor": None, **pipeline_parts}, scheduler=scheduler,
                                  add_watermarker=False)


FAMILY = StableDiffusionXL()
