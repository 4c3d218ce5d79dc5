"""Settings of new tokens (method.new_tokens): which are refused, and with what to type."""

from pathlib import Path

import pytest

from dreambooth.config.dataset import Subject
from dreambooth.config.enums import MethodKind, OptimizerKind
from dreambooth.config.method import Method, rare_words
from dreambooth.config.recipe import resolve
from dreambooth.errors import ConfigError
from dreambooth.runs.identity import identity
from tests.support.configs import compose_config, demo_config, resolve_demo

TOKENS = {"method__kind": MethodKind.lora, "method__new_tokens": 2}
BROKEN: dict[str, tuple[dict[str, object], str]] = {
    "their settings without them": (
        {"method__new_tokens": 0, "method__trigger_word": "zwx", "method__token_train_share": 0.5},
        "method.new_tokens=2"),
    "no adapter": ({"method__kind": MethodKind.full}, "method=lora"),
    "two words that may be meant": ({"dataset__instance_prompt": "zwx red toy"}, "method.trigger_word=zwx"),
    "a word that no prompt has": ({"method__trigger_word": "sks"}, "method.trigger_word=null"),
    "the class": ({"method__trigger_word": "Toy"}, "method.trigger_word=zwx"),
    "two learning rates in the backward pass": (
        {"memory__optimizer_in_backward": True}, "memory.optimizer_in_backward=false"),
    "a second point of the weights": (
        {"train__use_ema": False, "optimizer__kind": OptimizerKind.schedule_free}, "optimizer=adamw"),
    "a rate beside an estimated one": (
        {"method__token_learning_rate": 1e-3, "train__learning_rate": 1.0, "optimizer__kind": OptimizerKind.prodigy},
        "method.token_learning_rate=null"),
    "a compiled step": ({"train__compile": True}, "train.compile=false"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_new_tokens_cannot_do_is_one_sentence_that_says_what_to_type(what: str) -> None:
    values, typed = BROKEN[what]
    with pytest.raises(ConfigError) as caught:
        resolve(demo_config(**TOKENS | values), Path("runs/x"))
    [sentence] = caught.value.problems
    assert typed in sentence.partition(": ")[2] and "\n" not in sentence


def test_the_word_is_that_of_the_instance_prompt_which_the_class_prompt_lacks() -> None:
    assert rare_words("A photo of a ZWX toy", "a photo of a toy") == ["zwx"]
    assert rare_words("a photo of sks-1 person", "a photo of a person") == ["sks-1"]
    assert resolve_demo(**TOKENS).trigger_words == ("zwx",) and resolve_demo().trigger_words == ()
    subjects = [Subject("package:demo", f"a {word} toy", None, "a toy") for word in ("zwx", "sks")]
    several = resolve_demo(**TOKENS, dataset__instance_dir=None, dataset__instance_prompt=None,
                           dataset__class_prompt=None, dataset__concepts=subjects)
    assert several.trigger_words == ("zwx", "sks")
    for word in ("two words", "zwx_1", "../zwx", ""):
        with pytest.raises(ValueError, match=r"method\.trigger_word must be one word"):
            Method(trigger_word=word)


def test_only_settings_of_new_tokens_that_are_used_are_part_of_the_identity() -> None:
    typed = ["method=lora", "method.new_tokens=2"]
    tokens, longer, half = identity(compose_config(*typed)), "train.max_train_steps=9", "method.token_train_share=0.5"
    assert identity(compose_config("method=lora")) != tokens
    assert identity(compose_config(*typed, "method.token_initializer=toy")) != tokens
    assert identity(compose_config(*typed, longer)) == tokens
    assert identity(compose_config(*typed, half, longer)) != identity(compose_config(*typed, half))
