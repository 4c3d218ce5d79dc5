"""Qwen language models as text encoders: the part, tokenization with the chat template, and masks. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import UserError
from dreambooth.models.families.part import TransformersPart

if TYPE_CHECKING:
    from torch import Tensor

QWEN3 = TransformersPart("text_encoder", "transformers", "Qwen3Model")
QWEN3_LM = TransformersPart("text_encoder", "transformers", "Qwen3ForCausalLM")
LENGTH = 512  # number of tokens that the base models read
PLANNED_LENGTH = 64  # number of tokens of a prompt in the planner


def load_tokenizer(name: str, source: str | Path, **options: Any) -> Any:
    """Load a tokenizer from the subfolder `name` of a folder or hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, subfolder=name, **options)


def length(max_length: int) -> int:
    """Return the number of tokens that a prompt is padded to, for a model that reads at most `max_length` tokens."""
    return min(LENGTH, max_length)


def check_length(tokenizer: Any, prompt: str, thinking: bool = True) -> int:
    """Check that a prompt is not too long; return the maximum number of tokens that the model reads.

    Args:
        thinking: the argument enable_thinking of the chat template.

    Raises:
        UserError: the prompt has more tokens than the model reads.
    """
    limit = length(tokenizer.model_max_length)
    count = len(tokenizer(_chat(tokenizer, prompt, thinking)).input_ids)
    if count > limit:
        raise UserError(f"this model reads {limit} tokens and the prompt has {count}: shorten {prompt!r}")
    return limit


def tokenize(tokenizer: Any, prompt: str, thinking: bool = True) -> Tensor:
    """Return the token ids of a prompt in the chat template and their mask, (1, 2, L).

    The mask is 1 for tokens of the prompt and 0 for padding.

    Args:
        thinking: the argument enable_thinking of the chat template.

    Raises:
        UserError: the prompt has more tokens than the model reads.
    """
    import torch

    limit = check_length(tokenizer, prompt, thinking)
    found = tokenizer(_chat(tokenizer, prompt, thinking), padding="max_length", max_length=limit, return_tensors="pt")
    return torch.stack([found.input_ids, found.attention_mask], 1)


def lengths(text: Tensor) -> list[int]:
    """Return the number of valid rows of each prompt in `text` (P, L, D + 1), whose last column is the mask.

    The values are read from the device once. The planner's tensors have no memory; for them the result is
    PLANNED_LENGTH.
    """
    if text.data_ptr() == 0:
        return [min(PLANNED_LENGTH, text.shape[1])] * len(text)
    counts: list[int] = text[..., -1].sum(1).round().int().tolist()
    return counts


def _chat(tokenizer: Any, prompt: str, thinking: bool) -> str:
    """Return a prompt as the message of a user in the tokenizer's chat template."""
    chat: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return chat
