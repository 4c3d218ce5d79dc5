"""The trigger word in captions: the rule that docs/prepare.md states."""

import re

from hypothesis import given
from hypothesis import strategies as st

from dreambooth.preparation.trigger import contains_word, insert_trigger

PROMPT = "a photo of a zwx toy"
WORDS = st.lists(st.sampled_from(["a", "an", "An", "red", "toy", "Toy", "toys", "zwx", "ZWX", "zwxy", "on", "table,",
                                  "ünï", "teddy", "bear", "toy.", "“toy”", "\n", "  "]) | st.text(max_size=5),
                 max_size=12)


def put(caption: str, trigger: str = "zwx", class_word: str | None = "toy") -> str:
    return insert_trigger(caption, trigger, class_word, PROMPT)


def test_the_trigger_stands_before_the_first_class_word() -> None:
    assert put("a red Toy and a toy") == "a red zwx Toy and a toy"
    assert put("an umbrella. An umbrella", class_word="umbrella") == "a zwx umbrella. An umbrella"
    assert put("two teddy  bears, a Teddy\nbear", class_word="teddy bear") == "two teddy bears, a zwx Teddy bear"


def test_a_caption_without_the_class_word_stands_behind_the_prompt() -> None:
    assert put("two toys on a table") == f"{PROMPT}, two toys on a table"
    assert put("a mytoy") == f"{PROMPT}, a mytoy"
    assert put("a painting", class_word=None) == f"{PROMPT}, a painting"
    assert put("") == PROMPT


def test_a_caption_with_the_trigger_keeps_its_words() -> None:
    assert put("the  toy ZWX") == "the toy ZWX"
    assert put("a zwxy toy") == "a zwxy zwx toy"


@given(WORDS.map(" ".join), st.sampled_from(["zwx", "<zwx>", "z.x", "ohwx"]),
       st.sampled_from(["toy", "teddy bear", None]))
def test_no_word_is_lost_and_a_second_time_changes_nothing(caption: str, trigger: str, class_word: str | None) -> None:
    prompt = f"a photo of a {trigger} {class_word or ''}".strip()
    result = insert_trigger(caption, trigger, class_word, prompt)
    assert insert_trigger(result, trigger, class_word, prompt) == result == " ".join(result.split())
    assert contains_word(result, trigger)
    plain = " ".join(caption.split())
    if contains_word(plain, trigger):
        assert result == plain
    elif class_word and contains_word(plain, class_word):
        assert contains_word(result, f"{trigger} {class_word}")
        assert without_n(result.replace(f"{trigger} ", "", 1)) == without_n(plain)
    else:
        assert result == ", ".join(filter(None, [prompt, plain]))


def without_n(text: str) -> str:
    return re.sub(r"\b([Aa])n\b", r"\1", text)
