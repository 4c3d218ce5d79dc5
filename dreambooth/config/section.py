"""Base class of the config groups, and helpers that check rules about single fields."""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any, Self


class Section:
    """Base class of config groups. Fields are mutable until `seal` is called. In a Recipe every section is sealed."""

    def seal(self) -> None:
        """Make the section, and sections inside it, read-only."""
        for value in vars(self).values():
            if isinstance(value, Section):
                value.seal()
        object.__setattr__(self, "_sealed", True)

    def copy_with(self, **values: Any) -> Self:
        """Return a read-only copy with new values for the fields in `values`."""
        copy = replace(self, **values)  # type: ignore[type-var]
        copy.seal()
        return copy

    def __setattr__(self, name: str, value: object) -> None:
        if "_sealed" in self.__dict__:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)


def require(section: str, rules: dict[str, tuple[bool, str]]) -> None:
    """Check rules about the fields of a section.

    Args:
        section: name of the section, or "" if its keys have no prefix.
        rules: for each key of the section, a pair. The first item is whether the rule of the key holds. The second
            item is the rule, worded as the end of the sentence "KEY must be ...".

    Raises:
        ValueError: rules are broken; the message has one line per rule.
    """
    prefix = f"{section}." if section else ""
    broken = [f"{prefix}{key} must be {rule}" for key, (holds, rule) in rules.items() if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def finite(value: float, low: float, high: float = math.inf) -> bool:
    """Return whether a number is finite, at least `low` and at most `high`."""
    return math.isfinite(value) and low <= value <= high
