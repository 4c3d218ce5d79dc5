"""Qwen language models as text encoders: parts, tokenization with the chat template, and masks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.errors import UserError
from dreambooth.models.families.flow_transformer import FlowTransformer
from dreambooth.models.families.part import TransformersPart

if TYPE_CHECKING:
    from torch import Tensor

QWEN3 = TransformersPart("text_encoder", "transformers", "Qwen3Model")
QWEN3_LM = TransformersPart("text_encoder", "transformers", "Qwen3ForCausalLM")
LENGTH = 512  # number of tokens that the base models read
PLANNED_LENGTH = 64  # number of tokens of a prompt in the planner


class QwenTransformer(FlowTransformer):
    """Base class: the transformer's only text encoder is a Qwen language model.

    The token ids of P prompts have the shape (P, 2, L): the ids, and a mask that is 1 for the tokens of the prompt and
    0 for padding.
    """

    tokenizers = ("tokenizer",)
    thinking: bool  # the argument enable_thinking of the chat template

    def check_prompt(self, tokenizers: Sequence[Any], prompt: str) -> None:
        check_length(tokenizers[0], prompt, self.thinking)

    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        return tokenize(tokenizers[0], prompt, self.thinking)

    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        return torch.ones(count, 2, length(encoders[0].config.max_position_embeddings), dtype=torch.long)

    def sampling_arguments(self, pipeline: Any) -> dict[str, Any]:
        """Return the number of tokens that prompts are padded to, as in `tokens`."""
        return {"max_sequence_length": length(pipeline.tokenizer.model_max_length)}


def length(max_length: int) -> int:
    """Return the number of tokens that a prompt is padded to, for a model that reads at most `max_length` tokens."""
    return min(LENGTH, max_length)


def check_length(tokenizer: Any, prompt: str, thinking: bool) -> int:
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


def tokenize(tokenizer: Any, prompt: str, thinking: bool) -> Tensor:
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
    counts: list[int] = text[..., -1].float().sum(1).int().tolist()  # bf16 has no 301
    return counts


def _chat(tokenizer: Any, prompt: str, thinking: bool) -> str:
    """Return a prompt as the message of a user in the tokenizer's chat template."""
    chat: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return chat
