"""Hyperparameters arrive as text, plain or JSON-encoded. They are read strictly: "False" is false, "maybe" an error.

Each reader raises ValueError with the end of a sentence that begins with the hyperparameter's name.
"""

import json
import math
import re
from typing import Any


def text(raw: str) -> str:
    """A text. A blank may be escaped by a backslash, as the blog's notebook does for its shell."""
    found = decoded(raw)
    if isinstance(found, str):
        raw = found
    elif len(raw) > 1 and raw[0] == raw[-1] == '"':  # quoted, but a backslash in it is no JSON
        raw = raw[1:-1]
    return re.sub(r"\\(?=\s)", "", raw)


def truth(raw: str) -> bool:
    """true or false, in any case of letters."""
    word = text(raw).strip().lower()
    if word not in ("true", "false"):
        raise ValueError(f"must be true or false, not {text(raw)!r}")
    return word == "true"


def whole(raw: str) -> int:
    """A whole number."""
    word = text(raw).strip()
    if not re.fullmatch(r"[+-]?[0-9]+", word):
        raise ValueError(f"must be a whole number, not {text(raw)!r}")
    return int(word)


def number(raw: str) -> float:
    """A finite number."""
    word = text(raw).strip()
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", word) or math.isinf(float(word)):
        raise ValueError(f"must be a number, not {text(raw)!r}")
    return float(word)


def decoded(raw: str) -> Any:
    """What the text says as JSON; None if it is none."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def encoded(value: Any) -> str:
    """As JSON, as a hyperparameter that is no text would have come."""
    return json.dumps(value)


def quoted(plain: str) -> str:
    """A text in the grammar of Hydra's overrides, where it means itself and nothing else.

    A backslash counts there only before a quote and before ${, which would ask for another setting.
    """
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", plain)
    ended = re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", plain))
    return f"'{ended}'"
