"""New tokens in prompts: a word that a tokenizer gets as new tokens, and how prompts with this word are read.

The tokens of the word zwx are named zwx, zwx_1, zwx_2 and so on, as in `load_textual_inversion` of diffusers. A user
writes the word alone: "a photo of a zwx toy" is read as "a photo of a zwx zwx_1 toy". A tokenizer with new tokens
therefore needs no other information, and an exported pipeline that has such a tokenizer draws from the same prompts.

Imports no torch.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from dreambooth.config.method import WORD
from dreambooth.errors import UserError


def token_names(word: str, count: int) -> list[str]:
    """Return the names of the `count` tokens of a word: zwx, zwx_1, zwx_2, ..."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def extended(tokenizer: Any, words: Mapping[str, int]) -> Any:
    """Return a copy of a tokenizer with new tokens.

    Args:
        words: the words, in lower case, with the number of their tokens. The ids of the new tokens follow those of the
            tokenizer, in the order of the words.

    Raises:
        UserError: the tokenizer has a token of one of the names already.
    """
    from tokenizers import AddedToken

    tokenizer = deepcopy(tokenizer)
    known = tokenizer.get_vocab()
    for word, count in words.items():
        names = token_names(word, count)
        if taken := [name for name in names if name in known]:
            raise UserError(f"the base model's tokenizer knows the token {taken[0]} already, so that it cannot be new: "
                            f"write another rare word in place of {word} into the prompts")
        tokenizer.add_tokens([AddedToken(name, single_word=True) for name in names])
    return tokenizer


def new_words(tokenizer: Any) -> dict[str, int]:
    """Return the words that a tokenizer has new tokens for, with the number of their tokens."""
    names = {name for name in tokenizer.added_tokens_encoder if name not in tokenizer.all_special_tokens}
    words = {}
    for word in filter(WORD.fullmatch, sorted(names, key=tokenizer.added_tokens_encoder.get)):
        words[word] = 1
        while f"{word}_{words[word]}" in names:
            words[word] += 1
    return words


def expand(tokenizer: Any, prompt: str) -> str:
    """Return a prompt in which all tokens of a word are written in place of the word: "zwx zwx_1" for "zwx".

    Words that are longer, such as zwxy, are not changed. Upper and lower case are the same, as for the tokenizer. A
    prompt without such words is returned unchanged.
    """
    for word, count in new_words(tokenizer).items():
        tokens = " ".join(token_names(word, count))
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _, tokens=tokens: tokens,  # type: ignore[misc]
                        prompt, flags=re.IGNORECASE)
    return prompt


def use_in(pipeline: Any) -> None:
    """Make a diffusers pipeline read prompts with `expand`.

    The method of diffusers that this replaces also replaces the word inside of longer words, and not in upper case.
    """
    if hasattr(pipeline, "maybe_convert_prompt"):
        pipeline.maybe_convert_prompt = _convert


def _convert(prompt: str | list[str], tokenizer: Any) -> str | list[str]:
    return expand(tokenizer, prompt) if isinstance(prompt, str) else [expand(tokenizer, one) for one in prompt]
