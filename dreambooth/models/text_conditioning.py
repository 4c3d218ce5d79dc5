"""What a UNet is told besides noise and time, by family: one text encoder (Stable Diffusion 1.x, 2.x) or two (SDXL).

The rest of a run knows one tensor a prompt: token ids while text encoders train, else the `text` that they make of
them, fp32. Families differ in the shapes of both and in what the UNet is called with; all of it is here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dreambooth.errors import UserError


class Conditions(Protocol):
    """How prompts reach the UNet of a family."""

    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        """Token ids of a prompt with a first dimension of 1.

        Raises:
            UserError: the prompt has more tokens than the model reads.
        """

    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        """Ids of `count` prompts, whatever they say: for their shape."""

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        """What the text encoders make of token ids (N, ...)."""

    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        """The same for `count` prompts, fp32, with nothing computed: for its shape."""

    def predict(self, unet: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The UNet's prediction (N, C, h, w) for latents (N, C, h, w)."""

    def unused(self, encoders: Sequence[Any]) -> list[Any]:
        """Modules of the encoders that `text` does not depend on: they cannot train."""


class OneEncoder:
    """Stable Diffusion 1.x and 2.x. Ids (N, L), text (N, L, D): the last hidden states, normed."""

    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        return _tokens(tokenizers[0], prompt)

    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        return torch.zeros(count, encoders[0].config.max_position_embeddings, dtype=torch.long)

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        states: Tensor = encoders[0](tokens)[0]
        return states

    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        config = encoders[0].config
        return torch.empty(count, config.max_position_embeddings, config.hidden_size)

    def predict(self, unet: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        prediction: Tensor = unet(latents, timesteps, text, return_dict=False)[0]
        return prediction

    def unused(self, encoders: Sequence[Any]) -> list[Any]:
        return []


@dataclass(frozen=True)
class TwoEncoders:
    """SDXL (Podell et al. 2023, arXiv:2307.01952, section 2). Ids (N, 2, L), text (N, L + 1, D1 + D2).

    The first L rows of `text` are both encoders' states before their last layer, side by side; the last row begins with
    the second encoder's pooled and projected one. The UNet is also told the size of the picture, where it was
    cropped and the size that is wanted. These are taken from the latents: a training picture counts as one of its own
    size, not cropped, which is what the pipeline says of pictures that it makes.
    """

    vae_scale: int  # pixels of a side per latent

    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        return torch.stack([_tokens(tokenizer, prompt) for tokenizer in tokenizers], 1)

    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        return torch.zeros(count, len(encoders), encoders[0].config.max_position_embeddings, dtype=torch.long)

    def text(self, encoders: Sequence[Any], tokens: Tensor) -> Tensor:
        first = encoders[0](tokens[:, 0], output_hidden_states=True)
        second = encoders[1](tokens[:, 1], output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        pooled: Tensor = second.text_embeds
        row = F.pad(pooled, (0, states.shape[-1] - pooled.shape[-1])).unsqueeze(1)
        return torch.cat([states, row.to(states.dtype)], 1)

    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        width = sum(encoder.config.hidden_size for encoder in encoders)
        return torch.empty(count, encoders[0].config.max_position_embeddings + 1, width)

    def predict(self, unet: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        numbers = 6 * unet.config.addition_time_embed_dim
        pooled = text[:, -1, :unet.config.projection_class_embeddings_input_dim - numbers]
        high, wide = (float(side * self.vae_scale) for side in latents.shape[-2:])
        sizes = [latents.new_full((len(latents),), side) for side in (high, wide, 0.0, 0.0, high, wide)]
        added = {"text_embeds": pooled, "time_ids": torch.stack(sizes, 1)}
        prediction: Tensor = unet(latents, timesteps, text[:, :-1], added_cond_kwargs=added, return_dict=False)[0]
        return prediction

    def unused(self, encoders: Sequence[Any]) -> list[Any]:
        inside = getattr(encoders[0], "text_model", encoders[0])
        return [inside.encoder.layers[-1], inside.final_layer_norm]


def check_length(tokenizer: Any, prompt: str) -> int:
    """The number of tokens that the model reads.

    Raises:
        UserError: the prompt has more.
    """
    length: int = tokenizer.model_max_length
    ids = tokenizer(prompt).input_ids
    if len(ids) > length:
        raise UserError(f"this model reads {length} tokens and the prompt has {len(ids)}: shorten {prompt!r}")
    return length


def _tokens(tokenizer: Any, prompt: str) -> Tensor:
    """(1, L), padded to the length that the base was trained with."""
    length = check_length(tokenizer, prompt)
    padded = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt").input_ids
    return torch.as_tensor(padded)
