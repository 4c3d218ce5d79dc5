"""Puts texts of a user, such as prompts, into Markdown: model cards, and the descriptions of runs in MLflow."""

import re


def escape(text: str) -> str:
    """Escape the characters that Markdown would read as formatting, or as the end of a table cell."""
    return re.sub(r"([\\`*\[\]<|]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split("\n")))


def code_block(text: str) -> str:
    """Return a text as a code block, which shows the text as it is, whatever it contains."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
