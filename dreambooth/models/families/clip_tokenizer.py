"""CLIP's tokenizer, built from files of this package, because single files contain no tokenizer.

Several families share it. assets/clip/merges.txt.gz contains byte-pair merges from OpenAI CLIP's list: only those that
CLIP's vocabulary uses.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from dreambooth.utils.assets import resolve_asset

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def build(pad: str = END) -> Any:
    """Build CLIP's tokenizer: 49408 tokens in its vocabulary, 77 tokens per prompt, padded with the token `pad`."""
    from transformers import CLIPTokenizer

    merges: Any = _merges()  # CLIPTokenizer declares strings, but the tokenizers library takes pairs
    return CLIPTokenizer(vocab=_vocabulary(merges), merges=merges, bos_token=BEGIN, eos_token=END, unk_token=END,
                         pad_token=pad, model_max_length=LENGTH)


def save(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer to `folder`.

    A tokenizer with CLIP's own vocabulary also gets vocab.json and merges.txt, which older libraries read.
    """
    tokenizer.save_pretrained(folder)
    merges = _merges()
    if len(tokenizer) == len(_vocabulary(merges)):
        (folder / "vocab.json").write_text(json.dumps(_vocabulary(merges)), encoding="utf-8")
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _merges() -> list[tuple[str, str]]:
    with gzip.open(resolve_asset("package:clip/merges.txt.gz"), "rt", encoding="utf-8") as file:
        return [(first, second) for first, second in (line.split() for line in file)]


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Return the vocabulary as a dictionary from token to id.

    The ids follow the order of openai/CLIP, simple_tokenizer.py: bytes, bytes at the end of a word, merged pairs,
    BEGIN, END.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are their own characters
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    return {word: number for number, word in enumerate(words)}
