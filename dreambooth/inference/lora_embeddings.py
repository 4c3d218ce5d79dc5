"""Embeddings of new tokens that LoRAs bring along: gives a pipeline those of the LoRAs in use, and no others.

A tokenizer with new tokens reads their word as these tokens in every prompt. Many LoRAs of one base, also such with the
same word, therefore have tokenizers of their own, which are copies of the base model's.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.errors import UserError
from dreambooth.inference.loras import Lora
from dreambooth.models.families.family import Family
from dreambooth.models.new_tokens import prompts
from dreambooth.models.new_tokens.embedding_table import set_rows, table_of
from dreambooth.serialization import embedding_files


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizers for some LoRAs, and the embeddings (N, D) of their new tokens by the name of the text encoder."""

    tokenizers: tuple[Any, ...]
    rows: dict[str, Tensor]  # empty without new tokens


class AttachedEmbeddings:
    """Reads the embeddings of LoRAs, and sets the tokenizers and embeddings of a pipeline.

    Args:
        pipeline: the pipeline, with the tokenizers of the base model.
        family: its family.
        capacity: number of vocabularies to keep; the least recently used one is released first.
    """

    def __init__(self, pipeline: Any, family: Family, capacity: int) -> None:
        self._family, self._capacity = family, capacity
        self._base = Vocabulary(tuple(getattr(pipeline, name) for name in family.tokenizers), {})
        self._vocabularies: dict[Hashable, Vocabulary] = {}  # last used last
        self._used = self._base

    def vocabulary(self, loras: Sequence[Lora]) -> Vocabulary:
        """Return the vocabulary of some LoRAs. A LoRA with scale 0 has no effect, so its new tokens are left out.

        Raises:
            UserError: a file is damaged or belongs to another model family, or a word is new in two of the LoRAs, or in
                one of them and in the base model.
        """
        active = [lora for lora in loras if lora.scale and lora.embeddings]
        key = tuple(dict.fromkeys(lora.embeddings for lora in active))
        if not key:
            return self._base
        if key not in self._vocabularies:
            self._vocabularies[key] = self._read(active)
        self._vocabularies[key] = self._vocabularies.pop(key)
        while len(self._vocabularies) > self._capacity:
            del self._vocabularies[next(iter(self._vocabularies))]
        return self._vocabularies[key]

    def use(self, pipeline: Any, loras: Sequence[Lora]) -> None:
        """Make a pipeline use the new tokens of exactly these LoRAs.

        Raises:
            UserError: see `vocabulary`.
        """
        vocabulary = self.vocabulary(loras)
        if vocabulary is self._used:
            return
        for name, tokenizer in zip(self._family.tokenizers, vocabulary.tokenizers, strict=True):
            setattr(pipeline, name, tokenizer)
        for part, tokenizer in zip(self._family.encoders, self._base.tokenizers, strict=True):
            encoder = getattr(pipeline, part.name)
            rows = vocabulary.rows.get(part.name)
            set_rows(encoder, None if rows is None else nn.Parameter(rows.to(table_of(encoder).weight), False),
                     tokenizer.eos_token_id)
        self._used = vocabulary

    def _read(self, loras: Sequence[Lora]) -> Vocabulary:
        origins: dict[str, Lora] = {}
        words: dict[str, dict[str, Tensor]] = {}
        for lora in loras:
            for word, path, _ in lora.embeddings:
                if word in words and lora.embeddings != origins[word].embeddings:
                    raise UserError(f"the LoRAs {origins[word].path} and {lora.path} have embeddings of their own for "
                                    f"the same word {word}: draw with one of them at a time")
                if any(word in prompts.new_words(tokenizer) for tokenizer in self._base.tokenizers):
                    raise UserError(f"the base model has embeddings of its own for the word {word}, like the LoRA "
                                    f"{lora.path}: type base=DIR, the model that the LoRA was trained on")
                words[word], origins[word] = embedding_files.read(path, self._family), lora
        counts = {word: len(next(iter(rows.values()))) for word, rows in words.items()}
        return Vocabulary(tuple(prompts.extended(tokenizer, counts) for tokenizer in self._base.tokenizers), {
            part.name: torch.cat([rows[part.name] for rows in words.values()]) for part in self._family.encoders})
