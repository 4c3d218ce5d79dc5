"""Translates a search space between Hydra's grammar of overrides and Optuna's distributions."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from dreambooth.errors import UserError

Space = dict[str, BaseDistribution | str]  # key -> what is searched, or the text of a fixed value
Conditions = dict[str, list[tuple[str, frozenset[str]]]]  # key -> other keys, and the values that they must have


def read_space(params: Mapping[str, Any], arguments: Sequence[str]) -> Space:
    """Return the search space, in the order of the overrides. What is typed takes precedence over hydra.sweeper.params.

    Args:
        params: hydra.sweeper.params.
        arguments: overrides, as the user typed them.

    Raises:
        UserError: an interval has no values.
    """
    parser = OverridesParser.create()
    parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *arguments])
    space: Space = {}
    for override in parsed:
        try:
            space[override.get_key_element()] = _to_distribution(override)
        except ValueError as error:
            raise UserError(f"{override.input_line} cannot be searched ({error}): type KEY=interval(LOW,HIGH) with LOW "
                            "below HIGH, and above 0 with tag(log,interval(LOW,HIGH))") from error
    return space


def read_conditions(params: Mapping[str, Any], arguments: Sequence[str]) -> Conditions:
    """Return on which settings a searched key depends: in KEY: tag("OTHER=A|B",choice(...)), KEY needs OTHER=A or B.

    Other sweepers ignore tags, and search the key for every value of the other one.

    Raises:
        UserError: the other key is not part of the space, or follows the key.
    """
    words = [*(f"{key}={value}" for key, value in params.items()), *arguments]
    parsed = OverridesParser.create().parse_overrides(words)
    last = {override.get_key_element().lstrip("+"): override for override in parsed}
    conditions: Conditions = {}
    for override in last.values():
        key, value = override.get_key_element(), override.value()
        for tag in sorted(getattr(value, "tags", ()) if override.is_sweep_override() else ()):
            other, equals, texts = tag.partition("=")
            if not equals:
                continue
            if other not in list(last)[:list(last).index(key.lstrip("+"))]:
                raise UserError(f'{key} depends on "{tag}", and the search space does not set {other} before it: add '
                                f"{other} with choice(...) above {key}, or remove the tag")
            conditions.setdefault(key, []).append((other, frozenset(texts.split("|"))))
    return conditions


def searched(space: Space) -> dict[str, BaseDistribution]:
    """Return the part of a space that is not fixed."""
    return {key: value for key, value in space.items() if isinstance(value, BaseDistribution)}


def suggest(trial: Trial, space: Space, conditions: Conditions) -> tuple[str, ...]:
    """Let Optuna choose a point for a trial. Return the point as overrides, with the fixed values.

    A key whose condition does not hold is left out, so that its setting has its default.
    """
    point: dict[str, str] = {}
    for key, value in space.items():
        if _holds(conditions.get(key, ()), point):
            point[key] = value if isinstance(value, str) else to_text(_suggest_one(trial, key, value))
    return tuple(f"{key}={text}" for key, text in point.items())


def grid(space: Space, conditions: Conditions) -> list[dict[str, Any]]:
    """Return all points of a space, in the order of Hydra's basic sweeper, without keys whose condition does not hold.

    Raises:
        UserError: the space has an interval.
    """
    values = {key: list(_grid_values(key, distribution)) for key, distribution in searched(space).items()}
    fixed = {key: value for key, value in space.items() if isinstance(value, str)}
    points = []
    for choice in itertools.product(*values.values()):
        point = dict(zip(values, choice, strict=True))
        for key in values:
            texts = fixed | {name: to_text(value) for name, value in point.items()}
            if not _holds(conditions.get(key, ()), texts):
                del point[key]
        if point not in points:
            points.append(point)
    return points


def _holds(conditions: Sequence[tuple[str, frozenset[str]]], point: Mapping[str, str]) -> bool:
    """Return whether the settings of a point, by key, have the values that all conditions ask for."""
    texts = {key.lstrip("+"): text for key, text in point.items()}
    return all(texts.get(other) in values for other, values in conditions)


def _to_distribution(override: Override) -> BaseDistribution | str:
    """Return what an override searches. The end of a range belongs to it, unlike in Hydra's basic sweeper."""
    if not override.is_sweep_override():
        return str(override.get_value_element_as_str())
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        assert low is not None and high is not None
        return (IntDistribution(low, high, log=log) if isinstance(low, int) and isinstance(high, int)
                else FloatDistribution(low, high, log=log))
    if isinstance(value, RangeSweep) and not value.shuffle:
        start, stop, step = value.start, value.stop, value.step
        assert start is not None and stop is not None
        return (FloatDistribution(start, stop, step=step) if any(isinstance(x, float) for x in (start, stop, step))
                else IntDistribution(int(start), int(stop), step=int(step)))
    choices: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
    return CategoricalDistribution(choices)


def _suggest_one(trial: Trial, key: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def to_text(value: Any) -> str:
    """Return a value as Hydra's basic sweeper writes it into overrides."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else str(value)


def _grid_values(key: str, distribution: BaseDistribution) -> Iterator[Any]:
    if isinstance(distribution, CategoricalDistribution):
        yield from distribution.choices
    elif isinstance(distribution, IntDistribution | FloatDistribution) and not distribution.log and distribution.step:
        count = math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1
        yield from (distribution.low + i * distribution.step for i in range(count))
    else:
        raise UserError(f"a grid cannot contain the interval of {key}: type {key}=choice(...), or another sampler, "
                        "such as hydra/sweeper/sampler=tpe")
