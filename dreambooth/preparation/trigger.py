"""Puts the trigger word, the rare word that names the subject, into captions.

DreamBooth names the subject by a rare word before the word of its class, as in "a zwx dog" (Ruiz et al. 2023,
arXiv:2208.12242, section 3.2). Models that describe pictures know only the word of the class.
"""

import re


def insert_trigger(caption: str, trigger: str, class_word: str | None, prompt: str) -> str:
    """Return a caption as one line that contains the trigger word.

    1. A caption that contains the trigger word keeps its words.
    2. If the caption contains the class word, the trigger word is put before the first one: "a red dog" becomes
       "a red zwx dog". The article "an" directly before it becomes "a", as in the project's prompts.
    3. If the caption contains neither, it is put behind the prompt: "a photo of a zwx dog, two animals on a sofa".

    Words are compared without regard to upper and lower case, and count only as whole words. Applying the function a
    second time changes nothing.

    Args:
        trigger: one word without blanks.
        class_word: one or more words, such as "teddy bear", or None.
        prompt: the instance prompt, which contains the trigger word. It is the result for an empty caption.
    """
    caption = " ".join(caption.split())
    if contains_word(caption, trigger):
        return caption
    if class_word and (found := _pattern(class_word).search(caption)):
        before = re.sub(r"\b([Aa])n $", r"\1 ", caption[:found.start()])
        return f"{before}{trigger} {caption[found.start():]}"
    return f"{prompt}, {caption}" if caption else prompt


def contains_word(text: str, word: str) -> bool:
    """Return whether a text contains a word, or several words in a row, as whole words in any case."""
    return _pattern(word).search(text) is not None


def _pattern(words: str) -> re.Pattern[str]:
    return re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, words.split())) + r"(?!\w)", re.IGNORECASE)
