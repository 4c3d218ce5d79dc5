"""CLIP's tokenizer from the package: files of one model hold none, and Stable Diffusion's text encoders share it.

assets/clip/merges.txt.gz is OpenAI CLIP's list of byte pairs, the part that its vocabulary uses.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from dreambooth.utils.assets import asset

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def tokenizer(pad: str = END) -> Any:
    """CLIP's tokenizer: 49408 words, 77 a text, padded by `pad`."""
    from transformers import CLIPTokenizer

    merges: Any = _merges()  # its annotation says lines of text, the library below takes pairs
    return CLIPTokenizer(vocab=_vocabulary(merges), merges=merges, bos_token=BEGIN, eos_token=END, unk_token=END,
                         pad_token=pad, model_max_length=LENGTH)


def save(made: Any, folder: Path) -> None:
    """The tokenizer's files, with those that older libraries look for."""
    made.save_pretrained(folder)
    merges = _merges()
    if len(made) == len(_vocabulary(merges)):
        (folder / "vocab.json").write_text(json.dumps(_vocabulary(merges)), encoding="utf-8")
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _merges() -> list[tuple[str, str]]:
    with gzip.open(asset("package:clip/merges.txt.gz"), "rt", encoding="utf-8") as file:
        return [(first, second) for first, second in (line.split() for line in file)]


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Bytes, bytes that end a word, pairs in the order of merging, begin and end (openai/CLIP, simple_tokenizer.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as themselves
    letters = [*map(chr, shown), *(chr(256 + i) for i in range(256 - len(shown)))]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    return {word: number for number, word in enumerate(words)}
