"""CLIP's tokenizer, built from files of this package: single files hold none, and several families share it.

assets/clip/merges.txt.gz is OpenAI CLIP's list of byte pairs, the part that its vocabulary uses.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from dreambooth.utils.assets import resolve_asset

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def build(pad: str = END) -> Any:
    """Build CLIP's tokenizer: 49408 tokens, 77 per text, padded with the token `pad`."""
    from transformers import CLIPTokenizer

    merges: Any = _merges()  # annotated as lines of text; the tokenizers library below takes pairs
    return CLIPTokenizer(vocab=_vocabulary(merges), merges=merges, bos_token=BEGIN, eos_token=END, unk_token=END,
                         pad_token=pad, model_max_length=LENGTH)


def save(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files. CLIP's own also gets vocab.json and merges.txt, which older libraries read."""
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
    """Return token -> id: bytes, bytes that end a word, merged pairs in order, begin, end (openai/CLIP,
    simple_tokenizer.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    return {word: number for number, word in enumerate(words)}
