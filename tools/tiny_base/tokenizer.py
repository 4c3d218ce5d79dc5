"""Builds the tokenizer: byte-pair encoding as in CLIP, trained on every word that can occur in a caption."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from tools.tiny_base.emoji import concepts, vocabulary
from tools.tiny_base.pictures import COLOURS, RARE, SCENES

LENGTH = 16  # tokens per prompt
START, END = "<|startoftext|>", "<|endoftext|>"
PLAIN = "a an some photo of 3d render flat drawing cartoon on white background under with water wooden table forest"


def build(folder: Path) -> None:
    """Write the tokenizer to `folder`. Every word of the captions and every rare word is one token."""
    nouns = [*concepts(), *vocabulary()["classes"], *vocabulary()["say"].values(), *COLOURS, *SCENES.values(), PLAIN]
    words = sorted({word for text in nouns for word in str(text).lower().replace("-", " ").split()})
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.train_from_iterator([*words, *RARE], trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>", show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    letters = [letter + end for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) for end in ("", "</w>")]
    tokens = list(dict.fromkeys([*letters, *sorted(trained["vocab"], key=trained["vocab"].get), START, END]))
    CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(pair) for pair in trained["merges"]],
        model_max_length=LENGTH, bos_token=START, eos_token=END, unk_token=END, pad_token=END).save_pretrained(folder)
