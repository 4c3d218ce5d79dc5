"""The parts of a base model (denoiser, text encoders, VAE, tokenizers), and operations that its family defines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models.block_swap import BlockSwap
from dreambooth.models.families.family import Family
from dreambooth.models.new_tokens.training import NewTokens
from dreambooth.models.noise_schedule import NoiseSchedule
from dreambooth.models.prompt_encodings import PromptEncodings


@dataclass
class Components:
    """The parts of a base model. The methods of this class call the methods of `family` with these parts."""

    family: Family
    denoiser: Any
    encoders: Sequence[Any]  # text encoders, in the family's order; empty if `encodings` takes their place
    vae: Any
    tokenizers: Sequence[Any]  # in the family's order
    scheduler_config: dict[str, Any]
    extras: dict[str, Any] = field(default_factory=dict)  # exported, not trained: a safety checker
    swap: BlockSwap | None = None  # moves blocks of the denoiser between host and device
    encodings: PromptEncodings | None = None  # the text encoders' outputs, if the encoders have been released
    new_tokens: NewTokens | None = None  # tokens whose embeddings are trained; see new_tokens/training.py

    @property
    def modules(self) -> list[Any]:
        """The parts that have weights, except `extras`: the denoiser, the text encoders and the VAE."""
        return [self.denoiser, *self.encoders, self.vae]

    @property
    def encoders_by_name(self) -> dict[str, Any]:
        """The text encoders: a dictionary from part name to module; empty if they have been released."""
        parts = self.family.encoders if self.encodings is None else ()
        return {part.name: module for part, module in zip(parts, self.encoders, strict=True)}

    @property
    def modules_by_name(self) -> dict[str, Any]:
        """The modules of `modules`: a dictionary from part name to module."""
        return {self.family.denoiser.name: self.denoiser, self.family.vae.name: self.vae} | self.encoders_by_name

    @property
    def tokenizers_by_name(self) -> dict[str, Any]:
        """The tokenizers: a dictionary from tokenizer name to tokenizer."""
        return dict(zip(self.family.tokenizers, self.tokenizers, strict=True))

    @property
    def latent_channels(self) -> int:
        return self.family.latent_channels(self.denoiser)

    @property
    def vae_scale(self) -> int:
        """Image side in pixels divided by latent side."""
        return self.family.vae_scale(self.vae.config)

    @property
    def scaling_factor(self) -> float:
        """Factor by which the VAE's latents are multiplied before the denoiser receives them."""
        return self.family.scaling_factor(self.vae.config)

    def noise_schedule(self, recipe: Recipe) -> NoiseSchedule:
        """Return the forward process that the base model was trained with, with the noise levels of a run."""
        latent_side = recipe.model.resolution // self.vae_scale
        return self.family.noise_schedule(self.scheduler_config, recipe.flow, latent_side)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of the latents of `pixels`.

        Args:
            pixels: (N, 3, H, W), in [-1, 1].

        Returns:
            Two fp32 tensors (N, C, h, w).
        """
        return self.family.encode(self.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w), already divided by `scaling_factor`, to pixels (N, 3, H, W)."""
        return self.family.decode(self.vae, latents)

    def tokens(self, prompt: str) -> Tensor:
        """Return the token ids (1, ...) of a prompt, padded to the length that the base model was trained with.

        Raises:
            UserError: the prompt has more tokens than the model reads.
        """
        ids = self.family.tokens(self.tokenizers, prompt)
        return ids.to(self.encoders[0].device) if self.encoders else ids

    def blank_tokens(self, count: int) -> Tensor:
        """Return a tensor with the shape and type of the token ids of `count` prompts; its values have no meaning."""
        return self.family.blank_tokens(self.encoders, count)

    def text(self, tokens: Tensor) -> Tensor:
        """Return the text encoders' output for token ids (P, ...) of P prompts: one tensor (P, ...)."""
        return self.family.text(self.encoders, tokens)

    def frozen_text(self, prompt: str) -> Tensor:
        """Return the frozen text encoders' output for one prompt: an fp32 tensor (1, ...)."""
        if self.encodings is not None:
            return self.encodings[prompt].float()
        with torch.no_grad():
            return self.text(self.tokens(prompt)).float()

    def blank_text(self, count: int) -> Tensor:
        """Return an uninitialised fp32 tensor with the shape that `text` returns for `count` prompts."""
        return self.family.blank_text(self.encoders, count)

    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Return the denoiser's prediction (N, C, h, w); see Family.predict."""
        return self.family.predict(self.denoiser, latents, timesteps, text, self.vae_scale)


def training_scheduler(family: Family, config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the scheduler configuration to train with.

    It is `config`, the configuration of the base model. If the recipe sets model.zero_terminal_snr, its noise schedule
    is rescaled to zero terminal SNR.

    Raises:
        UserError: the recipe sets model.zero_terminal_snr, and the base model predicts noise. At the last timestep, the
            model's input would be pure noise, so that predicting this noise would be trivial (Lin et al. 2023,
            arXiv:2305.08891, section 3.2).
    """
    family.check_training(recipe)
    if not recipe.model.zero_terminal_snr:
        return config
    if config.get("prediction_type", "epsilon") == "epsilon":
        raise UserError("model.zero_terminal_snr=true needs a base that predicts v, and this one predicts noise: type "
                        "model.zero_terminal_snr=false")
    return family.rescale_to_zero_snr(config)


def disable_vae_autocast(parts: Components) -> None:
    """Make the VAE compute in fp32 even under autocast, if it overflows in fp16 and is therefore stored in fp32."""
    vae = parts.vae
    if vae.dtype is torch.float32 and parts.family.half_overflows(vae.config):
        vae.encode, vae.decode = partial(_in_fp32, vae.encode), partial(_in_fp32, vae.decode)


def _in_fp32(compute: Any, values: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(values.device.type, enabled=False):
        return compute(values.float(), *args, **kwargs)
