"""Qwen language models as text encoders: parts, tokenization of prompts, and masks. Imports no torch."""

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
LENGTH = 512  # number of rows of an encoded prompt that the base models read
PLANNED_LENGTH = 64  # number of tokens of a prompt in the planner


class QwenTransformer(FlowTransformer):
    """Base class: the transformer's only text encoder is a Qwen language model.

    The token ids of P prompts have the shape (P, 2, `dropped` + L): the ids of the messages, and a mask that is 1 for
    their tokens and 0 for padding. An encoded prompt has L rows.
    """

    tokenizers = ("tokenizer",)
    thinking: bool  # the argument enable_thinking of the chat template
    dropped: int = 0  # number of tokens at the start of each message that have no row in the encoded prompt
    padding_side: str | None = None  # None: the tokenizer's own

    def message(self, tokenizer: Any, prompt: str) -> str:
        """Return the text that the encoder reads: by default, the prompt in the tokenizer's chat template."""
        chat: str = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                  add_generation_prompt=True, enable_thinking=self.thinking)
        return chat

    def rows(self, max_length: int) -> int:
        """Return the number of rows of an encoded prompt, for a model that reads at most `max_length` tokens."""
        return min(LENGTH, max_length - self.dropped)

    def check_prompt(self, tokenizers: Sequence[Any], prompt: str) -> None:
        tokenizer = tokenizers[0]
        limit = self.rows(tokenizer.model_max_length)
        count = len(tokenizer(self.message(tokenizer, prompt)).input_ids) - self.dropped
        if count > limit:
            raise UserError(f"this model reads {limit} tokens and the prompt has {count}: shorten {prompt!r}")

    def tokens(self, tokenizers: Sequence[Any], prompt: str) -> Tensor:
        import torch

        self.check_prompt(tokenizers, prompt)
        tokenizer = tokenizers[0]
        found = tokenizer(self.message(tokenizer, prompt), padding="max_length", padding_side=self.padding_side,
                          max_length=self.dropped + self.rows(tokenizer.model_max_length), return_tensors="pt")
        return torch.stack([found.input_ids, found.attention_mask], 1)

    def blank_tokens(self, encoders: Sequence[Any], count: int) -> Tensor:
        import torch

        config = encoders[0].config.get_text_config()
        return torch.ones(count, 2, self.dropped + self.rows(config.max_position_embeddings), dtype=torch.long)

    def blank_text(self, encoders: Sequence[Any], count: int) -> Tensor:
        """Return the tensor for a family whose `text` returns one hidden state and the mask as the last column."""
        import torch

        config = encoders[0].config.get_text_config()
        return torch.empty(count, self.rows(config.max_position_embeddings), config.hidden_size + 1)

    def sampling_arguments(self, pipeline: Any) -> dict[str, Any]:
        """Return the number of rows of an encoded prompt, as in `tokens`."""
        return {"max_sequence_length": self.rows(pipeline.tokenizer.model_max_length)}


def lengths(text: Tensor) -> list[int]:
    """Return the number of valid rows of each prompt in `text` (P, L, D + 1), whose last column is the mask.

    The values are read from the device once. The planner's tensors have no memory; for them the result is
    PLANNED_LENGTH.
    """
    if text.data_ptr() == 0:
        return [min(PLANNED_LENGTH, text.shape[1])] * len(text)
    counts: list[int] = text[..., -1].float().sum(1).int().tolist()  # bf16 has no 301
    return counts
