"""Gives a base model the new tokens of a run, with their initial embeddings."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.config.recipe import Recipe
from dreambooth.models.components import Components
from dreambooth.models.new_tokens import prompts
from dreambooth.models.new_tokens.embedding_table import set_rows, table_of
from dreambooth.models.new_tokens.training import NewTokens
from dreambooth.utils import rng


def attach(parts: Components, recipe: Recipe) -> None:
    """Give the tokenizers and text encoders of `parts` the new tokens of a recipe, if it has any.

    Tokenizers that are None, those of the planner, stay None.

    Raises:
        UserError: a tokenizer knows a trigger word already.
    """
    words = dict.fromkeys(recipe.trigger_words, recipe.method.new_tokens)
    if not words:
        return
    base_tokenizers = parts.tokenizers
    parts.tokenizers = [tokenizer and prompts.extended(tokenizer, words) for tokenizer in base_tokenizers]
    rows, stds = {}, {}
    for (name, encoder), tokenizer in zip(parts.encoders_by_name.items(), base_tokenizers, strict=True):
        table = table_of(encoder).weight.detach()
        stds[name] = table.float().std()
        rows[name] = nn.Parameter(_initial_rows(name, table, stds[name], tokenizer, words, recipe))
        set_rows(encoder, rows[name], tokenizer.eos_token_id if tokenizer else encoder.config.eos_token_id)
    last_step = math.ceil(recipe.method.token_train_share * recipe.train.max_train_steps)
    parts.new_tokens = NewTokens(words, rows, stds, base_tokenizers, last_step)


def _initial_rows(name: str, table: Tensor, std: Tensor, tokenizer: Any, words: Mapping[str, int],
                  recipe: Recipe) -> Tensor:
    """Return the initial embeddings (N, D) of all tokens for the text encoder `name`, in fp32 on its device."""
    rows = torch.empty(sum(words.values()), table.shape[1], device=table.device)
    ids = []
    if recipe.method.token_initializer and tokenizer:
        ids = tokenizer(recipe.method.token_initializer, add_special_tokens=False).input_ids
    for part, (word, count) in zip(torch.split(rows, list(words.values())), words.items(), strict=True):
        if ids:
            part.copy_(table[[ids[number % len(ids)] for number in range(count)]])
        else:
            part.copy_(rng.normal((count, table.shape[1]), recipe.train.seed, name, word, "new tokens")).mul_(std)
    return rows
