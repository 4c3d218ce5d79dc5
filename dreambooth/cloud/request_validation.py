"""Checks a CreateTrainingJob request against botocore's service model before the request is sent.

The service model specifies patterns, length limits and enums for parameters. botocore itself does not check requests
against these patterns, limits and enums.
"""

import re
from collections.abc import Iterator
from typing import Any

UNICODE_CLASSES = {  # Python's re lacks these; the last one is Java's range of surrogate pairs
    r"\p{L}": "a-zA-ZÀ-￿", r"\p{Z}": " ", r"\p{N}": "0-9", r"\uD800\uDC00-\uDBFF\uDFFF": r"\U00010000-\U0010FFFF",
    r"\p{Print}": "[ -~]"}
CONFIDENTIAL = ("Environment", "HyperParameters", "Tags")  # parameters whose values may be secret and are not printed


def find_problems(value: Any, shape: Any, path: str = "") -> Iterator[str]:
    """Yield one sentence for each error in a request.

    Args:
        value: the request, or a value inside it.
        shape: botocore's Shape object, which specifies the values that the service accepts for `value`.
        path: position of `value` in the request, such as "Tags[0].Key"; empty for the request.
    """
    kind, limits = shape.type_name, shape.metadata
    if kind == "structure":
        yield from (f"{_join(path, name)} is missing" for name in shape.required_members if name not in value)
        for name, item in value.items():
            if name not in shape.members:
                yield f"{_join(path, name)} is not known to SageMaker"
            else:
                yield from find_problems(item, shape.members[name], _join(path, name))
    elif kind in ("list", "map"):
        yield from _check_limits(len(value), limits, f"{path} has {len(value)} entries")
        if kind == "list":
            for number, item in enumerate(value):
                yield from find_problems(item, shape.member, f"{path}[{number}]")
        else:
            for key, item in value.items():
                yield from find_problems(key, shape.key, f"{path} key {key[:40]}")
                yield from find_problems(item, shape.value, _join(path, key))
    elif kind == "string":
        yield from _check_string(value, shape, path)
    elif kind in ("integer", "long", "float", "double"):
        yield from _check_limits(value, limits, f"{path} is {value}")


def _check_string(value: Any, shape: Any, path: str) -> Iterator[str]:
    is_string = isinstance(value, str)
    shown = "the typed value" if path.startswith(CONFIDENTIAL) else repr(value[:80] if is_string else value)
    if not is_string:
        yield f"{path} must be a string, not {shown}"
        return
    limits = dict(shape.metadata)
    yield from _check_limits(len(value), limits, f"{path} has {len(value)} characters")
    if shape.enum and value not in shape.enum:
        yield f"{path} is {shown}, which SageMaker does not offer"
    pattern = limits.get("pattern")
    for unicode_class, characters in UNICODE_CLASSES.items():
        pattern = pattern.replace(unicode_class, characters) if pattern else None
    if pattern and not re.fullmatch(pattern, value, re.DOTALL):
        yield f"{path} is {shown}, which does not match {shape.metadata['pattern']}"


def _check_limits(count: float, limits: Any, description: str) -> Iterator[str]:
    if count < limits.get("min", count):
        yield f"{description}, at least {limits['min']} are needed"
    if count > limits.get("max", count):
        yield f"{description}, at most {limits['max']} are allowed"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
