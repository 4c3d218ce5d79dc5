"""Builds the tokenizers, byte-pair encodings that are trained on every word that can occur in a caption.

The UNet base model has a tokenizer as CLIP has; the flow base model has one as Qwen has, with ChatML as chat template.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tools.tiny_base.emoji import concepts, vocabulary
from tools.tiny_base.pictures import COLOURS, RARE, SCENES

LENGTH = 16  # tokens per prompt
START, END = "<|startoftext|>", "<|endoftext|>"
PLAIN = "a an some photo of 3d render flat drawing cartoon on white background under with water wooden table forest"

CHAT_LENGTH = 32  # tokens per prompt, 8 of which belong to the chat template
MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (  # ChatML; captions are lower-case
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | lower + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def words() -> list[str]:
    """Return every word of the captions, sorted. Hyphens separate words."""
    nouns = [*concepts(), *vocabulary()["classes"], *vocabulary()["say"].values(), *COLOURS, *SCENES.values(), PLAIN]
    return sorted({word for text in nouns for word in str(text).lower().replace("-", " ").split()})


def build(folder: Path) -> None:
    """Write CLIP's kind of tokenizer to `folder`. Every word of the captions and every rare word is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.train_from_iterator([*words(), *RARE], trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>", show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    letters = [letter + end for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) for end in ("", "</w>")]
    tokens = list(dict.fromkeys([*letters, *sorted(trained["vocab"], key=trained["vocab"].get), START, END]))
    CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(pair) for pair in trained["merges"]],
        model_max_length=LENGTH, bos_token=START, eos_token=END, unk_token=END, pad_token=END).save_pretrained(folder)


def build_chat(folder: Path) -> None:
    """Write Qwen's kind of tokenizer to `folder`.

    Every word of the captions and every rare word is one token, with and without a space before it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [*words(), *RARE, "user", "assistant"]
    tokenizer.train_from_iterator([*texts, *(f" {text}" for text in texts)], trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    special = [END, MESSAGE_START, MESSAGE_END]
    Qwen2Tokenizer(
        vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]], model_max_length=CHAT_LENGTH,
        unk_token=END, eos_token=MESSAGE_END, pad_token=END, additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE).save_pretrained(folder)
