"""The parts of a base model, and what they say about it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models.noise_schedule import Schedule
from dreambooth.models.text_conditioning import Conditions, OneEncoder, TwoEncoders

ABLE = "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"  # that know zero terminal SNR


@dataclass
class Components:
    """The parts of a StableDiffusionPipeline or, with a second text encoder, of a StableDiffusionXLPipeline, each on
    the training device."""

    unet: Any
    text_encoder: Any
    vae: Any
    tokenizer: Any
    scheduler_config: dict[str, Any]
    safety_checker: Any = None
    feature_extractor: Any = None
    text_encoder_2: Any = None
    tokenizer_2: Any = None

    @property
    def encoders(self) -> list[Any]:
        """The text encoders, in order."""
        return [self.text_encoder] if self.text_encoder_2 is None else [self.text_encoder, self.text_encoder_2]

    @property
    def modules(self) -> list[Any]:
        """Everything with weights that a run computes with."""
        return [self.unet, *self.encoders, self.vae]

    @property
    def conditions(self) -> Conditions:
        """How prompts reach the UNet."""
        return OneEncoder() if self.text_encoder_2 is None else TwoEncoders(self.vae_scale)

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def vae_scale(self) -> int:
        """Pixels of a side per latent: 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.config.scaling_factor)

    def noise_schedule(self) -> Schedule:
        """The forward process that the base was trained with, after any zero-terminal-SNR rescale."""
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        scheduler = DDPMScheduler.from_config(self.scheduler_config, clip_sample=False)
        return Schedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, C, h, w), fp32, of the latents of `pixels` (N, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            moments = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return moments.mean.float(), moments.std.float()

    def tokens(self, prompt: str) -> Tensor:
        """Token ids with a first dimension of 1, padded to the length that the base was trained with.

        Raises:
            UserError: the prompt has more tokens than the model reads.
        """
        tokenizers = [self.tokenizer] if self.tokenizer_2 is None else [self.tokenizer, self.tokenizer_2]
        return self.conditions.tokens(tokenizers, prompt).to(self.text_encoder.device)

    def hidden_states(self, prompt: str) -> Tensor:
        """What the frozen text encoders make of a prompt, with a first dimension of 1, fp32."""
        with torch.no_grad():
            return self.conditions.text(self.encoders, self.tokens(prompt)).float()


def half_overflows(config: Mapping[str, Any], two_encoders: bool) -> bool:
    """Whether a VAE gives NaN in fp16: SDXL's does and says so by `force_upcast`, its fp16 fix says that it does not.
    Older VAEs say nothing, and are fine."""
    return two_encoders and bool(config.get("force_upcast", True))


def says_fixed(name: str) -> bool:
    """Whether the name of a VAE's file says that fp16 does not overflow in it, which nothing else in the file does:
    sdxl-vae-fp16-fix. A VAE that is merely kept in half says fp16 too."""
    return bool(re.search(r"fp16[-_. ]?fix|fix[-_. ]?fp16", name, re.IGNORECASE))


def has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a base has a part, by its model_index.json."""
    return (index.get(part) or [None])[0] is not None


def base_schedule(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The base's scheduler, rescaled to zero terminal SNR if the recipe asks for it (Lin et al. 2023, arXiv:2305.08891,
    algorithm 1); pictures then begin at the last timestep (section 3.3).

    Raises:
        UserError: the base predicts noise, and at the last timestep there is nothing else to see (section 3.2).
    """
    if not recipe.model.zero_terminal_snr:
        return config
    if config.get("prediction_type", "epsilon") == "epsilon":
        raise UserError("model.zero_terminal_snr=true needs a base that predicts v, and this one predicts noise: type "
                        "model.zero_terminal_snr=false")
    return zero_snr(config)


def zero_snr(config: dict[str, Any]) -> dict[str, Any]:
    """The same scheduler rescaled to zero terminal SNR, or one that can be, with timesteps that begin at the last."""
    able = config if config.get("_class_name") in ABLE else config | {"_class_name": ABLE[0]}
    return able | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def keep_vae_whole(parts: Components) -> None:
    """Under autocast too, let a VAE that is kept in fp32 because half overflows in it compute in fp32."""
    vae = parts.vae
    if vae.dtype is torch.float32 and half_overflows(vae.config, parts.text_encoder_2 is not None):
        vae.encode, vae.decode = partial(_whole, vae.encode), partial(_whole, vae.decode)


def _whole(compute: Any, values: Tensor, *more: Any, **named: Any) -> Any:
    with torch.autocast(values.device.type, enabled=False):
        return compute(values.float(), *more, **named)
