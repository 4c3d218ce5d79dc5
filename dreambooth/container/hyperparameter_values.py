"""Strict parsers for hyperparameter values. Each value is a string, either plain or JSON-encoded.

`parse_bool` returns False for "False" and raises an error for "maybe". Each parser raises ValueError with a message
such as "must be a whole number, not 'x'". The caller prepends the hyperparameter's name to the message.
"""

import json
import math
import re
from typing import Any


def parse_text(raw: str) -> str:
    """Parse a string, and remove every backslash before a space.

    The notebook of the AWS blog post (see blog_hyperparameters.py) adds these backslashes as shell escapes.
    """
    value = decode_json(raw)
    if isinstance(value, str):
        raw = value
    elif len(raw) > 1 and raw[0] == raw[-1] == '"':  # quoted, but not valid JSON because of a backslash
        raw = raw[1:-1]
    return re.sub(r"\\(?=\s)", "", raw)


def parse_bool(raw: str) -> bool:
    """Parse true or false, in upper or lower case."""
    word = parse_text(raw).strip().lower()
    if word not in ("true", "false"):
        raise ValueError(f"must be true or false, not {parse_text(raw)!r}")
    return word == "true"


def parse_int(raw: str) -> int:
    """Parse a whole number."""
    word = parse_text(raw).strip()
    if not re.fullmatch(r"[+-]?[0-9]+", word):
        raise ValueError(f"must be a whole number, not {parse_text(raw)!r}")
    return int(word)


def parse_float(raw: str) -> float:
    """Parse a finite number."""
    word = parse_text(raw).strip()
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", word) or math.isinf(float(word)):
        raise ValueError(f"must be a number, not {parse_text(raw)!r}")
    return float(word)


def decode_json(raw: str) -> Any:
    """Return the value that a JSON string encodes, or None if the string is not JSON."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
