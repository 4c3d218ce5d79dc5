"""The tokenizer: CLIP's kind of byte-pair encoding, made from every word that a caption can hold."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import RobertaProcessing
from transformers import CLIPTokenizerFast

from tools.tiny_base.art import concepts, vocabulary
from tools.tiny_base.pictures import COLOURS, RARE, SCENES

LENGTH = 16  # tokens of a prompt
START, END = "<|startoftext|>", "<|endoftext|>"


def build(folder: Path) -> None:
    """Write the tokenizer; every word of the captions and every rare word is one token."""
    nouns = [*concepts(), *vocabulary()["classes"], *vocabulary()["say"].values(), *COLOURS, *SCENES.values()]
    plain = "a an some photo of 3d render flat drawing cartoon on white background under with water wooden table forest"
    words = sorted({word for text in [*nouns, plain] for word in str(text).lower().replace("-", " ").split()})
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, initial_alphabet=alphabet,
                                  end_of_word_suffix="</w>", special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator([*words, *RARE], trainer)
    tokenizer.add_special_tokens([START, END])
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    tokenizer.post_processor = RobertaProcessing(sep=(END, end), cls=(START, start), add_prefix_space=False,
                                                 trim_offsets=False)
    CLIPTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, bos_token=START, eos_token=END,
                      unk_token=END, pad_token=END).save_pretrained(folder)
