"""Which layers get an adapter, and with which rank and scale: method.target_modules, rank_pattern and their kind.

A pattern is compared with the names of layers, `PART.NAME`, such as unet.mid_block.attentions.0.proj_in. In a pattern,
`*` stands for any characters, dots included, `?` for one, and [abc] for one of these. A pattern matches a name, or the
end of a name that begins after a dot: to_q matches all layers of that name, as in the lists of peft.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from dreambooth.config.enums import Targets
from dreambooth.config.method import Method
from dreambooth.errors import UserError
from dreambooth.utils.plurals import counted


@dataclass(frozen=True)
class Choice:
    """The adapter of one layer."""

    rank: int
    alpha: float


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches the name of a layer, or the end of it after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def target_layers(part: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """Return the names of the layers of a part that can have an adapter and match `pattern`, a regular expression.

    These are linear layers and convolutions.
    """
    return [name for name, module in part.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and pattern.fullmatch(name)]


def select(model: nn.Module, method: Method, targets: Mapping[Targets, re.Pattern[str]]) -> dict[str, Choice]:
    """Return the rank and alpha of each layer of `model` that gets an adapter, by the layer's name.

    Args:
        model: a TrainedModel without adapters.
        targets: see `lora.inject`.

    Raises:
        UserError: a pattern matches no layer, or no layer remains.
    """
    found = [f"{part}.{name}" for part, module in model.named_children()
             for name in target_layers(module, targets[method.targets])]
    others = [f"{part}.{name}" for part, module in model.named_children()
              for name in target_layers(module, targets[Targets.all])]
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        for pattern in getattr(method, key) or ():
            _check_pattern(f"method.{key}", pattern, found, others, method.targets)
    chosen = [name for name in found if method.target_modules is None or _first(name, method.target_modules)]
    chosen = [name for name in chosen if not _first(name, method.exclude_modules)]
    if not chosen:
        raise UserError("method.exclude_modules leaves no layer with an adapter: type method.exclude_modules=[]")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(method, key) or ():
            if not any(_first(name, getattr(method, key)) == pattern for name in chosen):
                raise UserError(f"every layer that {pattern} in method.{key} matches has no adapter or matches an "
                                f"earlier pattern: leave {pattern} out")
    return {name: _choice(name, method) for name in chosen}


def _choice(name: str, method: Method) -> Choice:
    ranks, alphas = method.rank_pattern or {}, method.alpha_pattern or {}
    rank = ranks.get(_first(name, ranks), method.rank)
    alpha = alphas.get(_first(name, alphas), rank if method.alpha is None else method.alpha)
    return Choice(int(rank), float(alpha))


def _first(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if matches(name, pattern)), None)


def _check_pattern(key: str, pattern: str, found: list[str], others: list[str], targets: Targets) -> None:
    if any(matches(name, pattern) for name in found):
        return
    if count := sum(matches(name, pattern) for name in others):
        raise UserError(f"{pattern} in {key} matches {counted(count, 'layer')}, none of them a layer of "
                        f"method.targets={targets.value}: type method.targets=all")
    similar = _similar(pattern, found)
    raise UserError(f"{pattern} in {key} matches no layer; similar names are {', '.join(similar)}: type {similar[0]} "
                    "in its place")


def _similar(pattern: str, names: list[str]) -> list[str]:
    """Return up to three names, or ends of names, that resemble a pattern."""
    endings = {".".join(name.split(".")[-count:]) for name in names for count in (1, 2, 3)} | {
        ".".join(name.split(".")[:count]) + ".*" for name in names for count in (2, 3, 4)} | set(names)
    return get_close_matches(pattern, sorted(endings), 3, 0.4) or names[:3]


def describe(parts: Sequence[str], method: Method, trained: Mapping[str, int]) -> Iterator[str]:
    """Yield lines that say how many layers have an adapter, with how many weights; one line per pattern.

    Args:
        parts: the names of the trained parts, such as unet.
        trained: for each layer with an adapter, the number of weights that are trained there.
    """
    counts = {part: sum(name.startswith(f"{part}.") for name in trained) for part in parts}
    places = ", ".join(f"{counted(count, 'layer')} of {part}" for part, count in counts.items() if count)
    yield f"adapter: {method.kind.value} in {places}, {sum(trained.values()):,} weights"
    for key in ("target_modules", "rank_pattern", "alpha_pattern"):
        table = getattr(method, key) or ()
        for pattern in table:
            sizes = [size for name, size in trained.items() if _first(name, table) == pattern or (
                key == "target_modules" and matches(name, pattern))]
            value = f"={table[pattern]}" if isinstance(table, dict) else ""
            yield f"  {key} {pattern}{value}: {counted(len(sizes), 'layer')}, {sum(sizes):,} weights"
