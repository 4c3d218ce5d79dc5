"""What every config group has: values that can be sealed, and rules that name the key they are about."""

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any, Self


class Section:
    """A config group: mutable while Hydra composes it, read-only once `seal`ed into a Recipe."""

    def seal(self) -> None:
        object.__setattr__(self, "_sealed", True)

    def changed(self, **values: Any) -> Self:
        """A sealed copy with other values."""
        made = replace(self, **values)  # type: ignore[type-var]
        made.seal()
        return made

    def __setattr__(self, name: str, value: object) -> None:
        if "_sealed" in self.__dict__:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)


def require(section: str, rules: dict[str, tuple[bool, str]]) -> None:
    """Raise one ValueError that names every key of `section` whose rule does not hold."""
    prefix = f"{section}." if section else ""
    broken = [f"{prefix}{key} must be {what}" for key, (holds, what) in rules.items() if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def finite(value: float, low: float, high: float = math.inf) -> bool:
    return math.isfinite(value) and low <= value <= high
