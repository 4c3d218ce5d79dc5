"""What AWS would refuse, found before a request is sent: patterns, lengths and enums of botocore's own model of the
service, which botocore itself does not check."""

import re
from collections.abc import Iterator
from typing import Any

UNICODE = {r"\p{L}": "a-zA-ZÀ-￿", r"\p{Z}": " ", r"\p{N}": "0-9"}  # classes that Python's re does not know

HIDDEN = ("Environment", "HyperParameters", "Tags")  # what people put there is not repeated: it may be secret


def problems(value: Any, shape: Any, where: str = "") -> Iterator[str]:
    """Every part of a request that its shape does not allow, in a sentence each."""
    kind, limits = shape.type_name, shape.metadata
    if kind == "structure":
        yield from (f"{_at(where, name)} is missing" for name in shape.required_members if name not in value)
        for name, item in value.items():
            if name not in shape.members:
                yield f"{_at(where, name)} is not known to SageMaker"
            else:
                yield from problems(item, shape.members[name], _at(where, name))
    elif kind in ("list", "map"):
        yield from _count(len(value), limits, f"{where} has {len(value)} entries")
        if kind == "list":
            for number, item in enumerate(value):
                yield from problems(item, shape.member, f"{where}[{number}]")
        else:
            for key, item in value.items():
                yield from problems(key, shape.key, f"{where} key {key[:40]}")
                yield from problems(item, shape.value, _at(where, key))
    elif kind == "string":
        yield from _text(value, shape, where)
    elif kind in ("integer", "long", "float", "double"):
        yield from _count(value, limits, f"{where} is {value}")


def _text(value: Any, shape: Any, where: str) -> Iterator[str]:
    shown = "what was typed" if where.startswith(HIDDEN) else repr(value[:80] if isinstance(value, str) else value)
    if not isinstance(value, str):
        yield f"{where} must be a text, not {shown}"
        return
    limits = dict(shape.metadata)
    yield from _count(len(value), limits, f"{where} has {len(value)} characters")
    if shape.enum and value not in shape.enum:
        yield f"{where} is {shown}, which SageMaker does not offer"
    pattern = limits.get("pattern")
    for unknown, known in UNICODE.items():
        pattern = pattern.replace(unknown, known) if pattern else None
    if pattern and not re.fullmatch(pattern, value, re.DOTALL):
        yield f"{where} is {shown}, which does not match {shape.metadata['pattern']}"


def _count(count: float, limits: Any, what: str) -> Iterator[str]:
    if count < limits.get("min", count):
        yield f"{what}, at least {limits['min']} are needed"
    if count > limits.get("max", count):
        yield f"{what}, at most {limits['max']} are allowed"


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
