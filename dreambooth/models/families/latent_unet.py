"""The base class of families with a UNet, an AutoencoderKL and CLIP text encoders. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.config.enums import AttentionKind, Targets
from dreambooth.config.storage import is_single_file
from dreambooth.models.families import clip_text, clip_tokenizer
from dreambooth.models.families.family import Family, Layout
from dreambooth.models.families.file_format import Entry
from dreambooth.models.families.part import DiffusersPart, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreambooth.config.schema import Flow
    from dreambooth.models.noise_schedule import NoiseSchedule

# Schedulers of diffusers that can be rescaled to zero terminal SNR.
RESCALABLE_SCHEDULERS = "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"
ATTENTION_LAYERS = r"to_[qkv]|to_out\.0|[qkv]_proj|out_proj"
# Name of a layer of the VAE's attention in older versions of diffusers -> its current name.
OLD_VAE_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class LatentUNet(Family):
    """Base class: a UNet denoises the latents of an AutoencoderKL, conditioned on CLIP text encoders.

    By default there is one text encoder, and its last hidden states are the UNet's condition.
    """

    denoiser = DiffusersPart("unet", "diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel")
    vae = DiffusersPart("vae", "diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL")
    encoders: tuple[Part, ...] = (clip_text.FIRST,)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    embedding_keys: tuple[str, ...] = ("emb_params",)
    tags = ("stable-diffusion",)
    adapter_targets = {  # patterns of layer names in diffusers' UNet and in transformers' text encoders
        Targets.attention: re.compile(rf"(.*\.)?({ATTENTION_LAYERS})"),
        Targets.transformer: re.compile(rf"(.*\.)?({ATTENTION_LAYERS}|ff\.net\.(0\.proj|2)|proj_in|proj_out|fc[12])"),
        Targets.all: re.compile(".*"),
    }
    pad_tokens: Mapping[str, str]  # tokenizer name -> padding token
    pipeline_module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    pipeline_name = "StableDiffusionPipeline"
    # Part name -> prefix of its keys in kohya's LoRA layout.
    kohya_prefixes: Mapping[str, str] = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    kohya_version: str  # kohya's name of the base model, in the metadata of LoRA files
    kohya_implementation = "diffusers"  # in ModelSpec metadata: whose module names the keys of kohya's layout contain
    half_safe_vaes: tuple[str, ...] = ()  # hub ids of VAEs in which fp16 does not overflow
    activations_gib = {True: 0.2, False: 1.8}  # the planner predicts 0.26 and 2 for version 1.5 at 512 px

    # -- parts -----------------------------------------------------------------------------------------------------

    def load_tokenizer(self, name: str, source: str | Path, **options: Any) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(source, subfolder=name, **options)

    def packaged_tokenizer(self, name: str) -> Any:
        return clip_tokenizer.build(self.pad_tokens[name])

    def save_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        clip_tokenizer.save(tokenizer, folder)

    def load_extras(self, source: str, layout: Layout, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
        """Load the base model's safety checker, if there is one, and the image processor that the checker needs."""
        if "safety_checker" not in layout.parts:
            return {}
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        checker = StableDiffusionSafetyChecker.from_pretrained(
            source, subfolder="safety_checker", dtype=dtype, **options)
        options.pop("variant", None)
        return {"safety_checker": checker,
                "feature_extractor": CLIPImageProcessor.from_pretrained(
                    source, subfolder="feature_extractor", **options)}

    def current_name(self, name: str, names: Collection[str]) -> str:
        before, _, end = name.rpartition(".")
        *outer, last = before.split(".")
        renamed = ".".join([*outer, OLD_VAE_LAYERS.get(last, last), end])
        for candidate in (name, clip_text.without_level(name), f"text_model.{name}", renamed):
            if candidate in names:
                return candidate
        return name

    # -- prompts to conditions: one text encoder -------------------------------------------------------------------

    def check_prompt(self, tokenizers: Sequence[Any], prompt: str) -> None:
        for tokenizer in tokenizers:
            clip_text.check_length(tokenizer, prompt)

    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        """Return the token ids of one prompt, (1, L)."""
        return clip_text.tokenize(tokenizers[0], prompt)

    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        return torch.zeros(count, encoders[0].config.max_position_embeddings, dtype=torch.long)

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        """Return the last hidden states after the final layer norm, (P, L, D), for token ids (P, L)."""
        states: Tensor = encoders[0](tokens)[0]
        return states

    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        config = encoders[0].config
        return torch.empty(count, config.max_position_embeddings, config.hidden_size)

    # -- the denoiser ----------------------------------------------------------------------------------------------

    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, text: Tensor, vae_scale: int,
                size_and_crop: Tensor | None = None) -> Tensor:
        prediction: Tensor = denoiser(latents, timesteps, text, return_dict=False)[0]
        return prediction

    def set_attention(self, denoiser: Any, kind: AttentionKind) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        match kind:
            case AttentionKind.sdpa:
                denoiser.set_attn_processor(AttnProcessor2_0())
            case AttentionKind.eager:
                denoiser.set_attn_processor(AttnProcessor())
            case AttentionKind.sliced:
                denoiser.set_attention_slice("max")
            case AttentionKind.xformers:
                denoiser.enable_xformers_memory_efficient_attention()

    def recompute_activations(self, denoiser: Any, groups: int) -> None:
        from dreambooth.models.gradient_checkpointing import recompute

        recompute(denoiser, groups)

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels)

    def levels(self, denoiser: Any) -> int:
        return len(denoiser.config.block_out_channels)

    def native_side(self, denoiser: Any, vae: Any, vae_scale: int) -> int:
        side: int = denoiser.config.sample_size * vae_scale
        return side

    def with_native_side(self, configuration: Mapping[str, Any], latent_side: int) -> dict[str, Any]:
        return {**configuration, "sample_size": latent_side}

    # -- pixels to latents -----------------------------------------------------------------------------------------

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        with torch.no_grad():
            moments = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return moments.mean.float(), moments.std.float()

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return pixels

    def is_half_safe(self, source: str) -> bool:
        """Return whether a hub id is in `half_safe_vaes`, or the name of a file contains fp16-fix.

        The word fp16 alone is not enough: it may only mean that the weights are stored in fp16.
        """
        if not is_single_file(source):
            return source in self.half_safe_vaes
        return bool(re.search(r"fp16[-_. ]?fix|fix[-_. ]?fp16", Path(source).stem, re.IGNORECASE))

    def mark_half_safe(self, vae_configuration: Mapping[str, Any], safe: bool) -> dict[str, Any]:
        return {**vae_configuration, "force_upcast": not safe}

    # -- noise -----------------------------------------------------------------------------------------------------

    def noise_schedule(self, scheduler_config: Mapping[str, Any], flow: Flow, latent_side: int) -> NoiseSchedule:
        """Return the noise schedule of the base model, rescaled if the configuration sets rescale_betas_zero_snr."""
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        from dreambooth.models.noise_schedule import DiffusionSchedule

        scheduler = DDPMScheduler.from_config(scheduler_config, clip_sample=False)
        return DiffusionSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def rescale_to_zero_snr(self, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a scheduler configuration with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891, algorithm 1).

        Sampling then starts at the last timestep (section 3.3). A scheduler class that cannot rescale its noise
        schedule is replaced by DDIMScheduler.
        """
        config = dict(scheduler_config)
        if config.get("_class_name") not in RESCALABLE_SCHEDULERS:
            config["_class_name"] = RESCALABLE_SCHEDULERS[0]
        return config | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

    def sampling_scheduler(self, scheduler_config: Mapping[str, Any]) -> Any:
        """Return a DPM-Solver++ scheduler (Lu et al. 2022, arXiv:2211.01095)."""
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(scheduler_config)

    # -- pipelines -------------------------------------------------------------------------------------------------

    def side_multiple(self, pipeline: Any) -> int:
        return math.lcm(8, pipeline.vae_scale_factor)  # the pipelines of diffusers require multiples of 8

    def build_pipeline(self, parts: Mapping[str, Any], scheduler: Any) -> Any:
        safety = {name: parts.get(name) for name in ("safety_checker", "feature_extractor")}
        return self.pipeline_type(**{**parts, **safety}, scheduler=scheduler,
                                  requires_safety_checker=safety["safety_checker"] is not None)

    # -- adapters --------------------------------------------------------------------------------------------------

    def published_name(self, name: str) -> str:
        return clip_text.published_name(name)

    def kohya_entries(self, names: Collection[str], denoiser_config: Any, separate: bool = False) -> Iterator[Entry]:
        for name, key in self.kohya_names(names, denoiser_config).items():
            yield Entry(key, name.partition(".")[0], (name,))

    def kohya_names(self, names: Collection[str], denoiser_config: Any) -> dict[str, str]:
        """Return a dictionary from module name to key, see `kohya_entries`."""
        parts = {name: self.published_name(name).partition(".") for name in names}
        return {name: self.kohya_prefixes[part] + layer.replace(".", "_") for name, (part, _, layer) in parts.items()}

    def kohya_metadata(self, prediction_type: str) -> dict[str, str]:
        """Return the metadata that describes the base model in a LoRA file, with the values of kohya's trainer.

        AUTOMATIC1111 and Forge sort LoRA files by some of these entries. The other entries follow ModelSpec.
        """
        modelspec = self.single_file.modelspec(prediction_type)
        return modelspec | {
            "modelspec.architecture": modelspec["modelspec.architecture"] + "/lora",
            "modelspec.implementation": self.kohya_implementation, "ss_base_model_version": self.kohya_version,
            "ss_v2": str(self.kohya_version.startswith("sd_v2"))}
