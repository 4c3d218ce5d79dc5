"""CLIP text encoders: parts, tokenization and weight names, shared by several families. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreambooth.errors import UserError
from dreambooth.models.families.part import TransformersPart
from dreambooth.models.new_tokens import prompts

if TYPE_CHECKING:
    from torch import Tensor

FIRST = TransformersPart("text_encoder", "transformers", "CLIPTextModel")
SECOND = TransformersPart("text_encoder_2", "transformers", "CLIPTextModelWithProjection")


def check_length(tokenizer: Any, prompt: str) -> int:
    """Check that a prompt is not too long; return the maximum number of tokens that the model reads.

    Raises:
        UserError: the prompt has more tokens than the model reads.
    """
    length: int = tokenizer.model_max_length
    ids = tokenizer(prompts.expand(tokenizer, prompt)).input_ids
    if len(ids) > length:
        raise UserError(f"this model reads {length} tokens and the prompt has {len(ids)}: shorten {prompt!r}")
    return length


def tokenize(tokenizer: Any, prompt: str) -> Tensor:
    """Return the token ids of a prompt, (1, L), padded to the length L that the base model was trained with.

    Raises:
        UserError: the prompt has more tokens than the model reads.
    """
    import torch

    length = check_length(tokenizer, prompt)
    text = prompts.expand(tokenizer, prompt)
    padded = tokenizer(text, padding="max_length", max_length=length, return_tensors="pt").input_ids
    return torch.as_tensor(padded)


def published_name(name: str) -> str:
    """Return the name that a module has in LoRA files. Both `name` and the result have the form PART.NAME.

    LoRA files follow older transformers versions, in which the layers of a text encoder are inside `text_model`.
    """
    part, _, rest = name.partition(".")
    if part.startswith("text_encoder") and rest.startswith(("encoder.", "embeddings.")):
        return f"{part}.text_model.{rest}"
    return name


def without_level(name: str) -> str:
    """Return a weight's name without the prefix `text_model.` of older transformers versions."""
    return name.removeprefix("text_model.")
