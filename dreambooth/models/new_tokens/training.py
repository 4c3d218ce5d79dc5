"""Trains the embeddings of new tokens together with an adapter: pivotal tuning with textual inversion.

Gal et al. 2022 (arXiv:2208.01618, section 3) find the embedding of a new word with which a frozen model draws a
subject. Roich et al. 2021 (arXiv:2106.05744, section 3.2) then fine-tune the generator around such an embedding, the
pivot. Trainers of diffusion models train both at once: the text encoder reads the new embeddings in each step, and
everything else in it stays frozen. The initial values and the normalization are those of
train_dreambooth_lora_sdxl_advanced.py of diffusers (`TokenEmbeddingsHandler`):

- initial values: normal random numbers with the standard deviation s of the embedding table, or known embeddings.
- after each step, the rows E of one text encoder become E (s / std(E))^0.1, which keeps them near the size of known
  embeddings.

The EMA contains the embeddings, because an adapter and the embeddings that it was trained with belong together.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.recipe import Recipe
from dreambooth.models.new_tokens.embedding_table import write_into_table

RETRACTION = 0.1  # exponent of the normalization after each step


@dataclass
class NewTokens:
    """The new tokens of a run.

    Attributes:
        words: the words that they replace, with the number of their tokens.
        rows: the embeddings (N, D) by the name of the text encoder, for all tokens in the order of `words`.
        stds: standard deviation of each text encoder's embedding table (0-d).
        base_tokenizers: the tokenizers of the base model, which do not know the tokens.
        last_step: the last step, counted from 1, in which the embeddings are trained.
    """

    words: Mapping[str, int]
    rows: dict[str, nn.Parameter]
    stds: dict[str, Tensor]
    base_tokenizers: Sequence[Any]
    last_step: int

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Normalize the embeddings. `step` is the number of optimizer steps so far, without skipped ones."""
        for name, rows in self.rows.items() if step <= self.last_step else ():
            rows.mul_((self.stds[name] / rows.std()) ** RETRACTION)

    def stop_in(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Set the learning rate of the last parameter group, that of the embeddings, to 0 after `last_step`."""
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        factor = scheduler.lr_lambdas[-1]

        def factor_until_last(step: int) -> float:
            return float(factor(step)) if step < self.last_step else 0.0

        scheduler.lr_lambdas[-1] = factor_until_last

    def by_word(self) -> dict[str, dict[str, Tensor]]:
        """Return the embeddings of each word, (n, D), by the name of the text encoder: in fp32 on the CPU."""
        return {word: {name: rows.detach().float().cpu()[end - count:end] for name, rows in self.rows.items()}
                for (word, count), end in zip(self.words.items(), accumulate(self.words.values()), strict=True)}

    def write_into(self, encoders: Mapping[str, Any], tokenizers: Sequence[Any]) -> None:
        """Append the embeddings to the tables of text encoders of the base model, to export them."""
        for (name, encoder), tokenizer in zip(encoders.items(), tokenizers, strict=True):
            write_into_table(encoder, self.rows[name], tokenizer.eos_token_id)

    @contextmanager
    def unread(self, pipeline: Any, names: Sequence[str]) -> Iterator[None]:
        """Let a pipeline read prompts as the base model does, without new tokens, inside the context.

        Args:
            names: the names of the tokenizers.
        """
        extended = [getattr(pipeline, name) for name in names]
        try:
            for name, tokenizer in zip(names, self.base_tokenizers, strict=True):
                setattr(pipeline, name, tokenizer)
            yield
        finally:
            for name, tokenizer in zip(names, extended, strict=True):
                setattr(pipeline, name, tokenizer)


def optimizer_options(recipe: Recipe) -> dict[str, float]:
    """Return the options of the optimizer for the embeddings.

    Weight decay would pull them to zero. Instead, their size is normalized.
    """
    return {"lr": recipe.method.token_learning_rate or recipe.train.learning_rate, "weight_decay": 0.0}
