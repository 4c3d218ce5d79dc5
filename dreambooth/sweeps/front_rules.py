"""Rules that choose one run of a sweep with several objectives, such as class_drift<=0.1: the option `rule` of promote.

The run that is best in the remaining objective, among those that satisfy the rule, is on the Pareto front.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dreambooth.config.evaluate import better_direction, split_objectives
from dreambooth.errors import UserError
from dreambooth.sweeps.trials import Trial
from dreambooth.utils import quoting

_COMPARE: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Condition:
    """One condition of a rule: a measure, a sum of measures or instance_loss, compared with a bound."""

    name: str
    sign: str  # <= or >=
    bound: float

    def reason_broken(self, trial: Trial) -> str | None:
        """Return why a trial does not satisfy the condition; None if it does.

        Raises:
            UserError: the trial's settings do not select the measure.
        """
        value = trial.value(self.name)
        if math.isnan(value):
            return f"{trial.folder.name} did not measure {self.name}"
        if _COMPARE[self.sign](value, self.bound):
            return None
        return f"{trial.folder.name} has {self.name} {value:.4g}, and the rule is {self.name}{self.sign}{self.bound:g}"


def parse_rule(text: str | None) -> list[Condition]:
    """Parse a rule: conditions MEASURE<=NUMBER or MEASURE>=NUMBER, separated by commas. None has no conditions.

    Raises:
        UserError: a condition has another form, or names no measure.
    """
    conditions = []
    for part in text.split(",") if text is not None else ():
        found = re.fullmatch(r"\s*([^<>=]+?)\s*(<=|>=)\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*", part)
        try:
            bound = float(found[3]) if found else math.nan
            if found:
                better_direction(found[1])
        except ValueError as error:
            raise UserError(f"rule {error}" if str(error).startswith("names") else _form(part)) from error
        if not found:
            raise UserError(_form(part))
        conditions.append(Condition(found[1], found[2], bound))
    return conditions


def resolve_objective(objectives: str, rule: str | None, key_prefix: str = "") -> str:
    """Return the one objective by which the runs are compared that satisfy a rule.

    Args:
        objectives: as in evaluate.objective: one, or several that are separated by commas.
        key_prefix: prefix of the keys with which the user can change the choice, for the message.

    Raises:
        UserError: the rule does not leave exactly one of several objectives.
    """
    names, conditions = split_objectives(objectives), {condition.name for condition in parse_rule(rule)}
    left = [name for name in names if name not in conditions]
    if len(names) == 1:
        return names[0]
    if len(left) != 1:
        example = ",".join(_example(name) for name in names[1:])
        raise UserError(f"the runs have several objectives ({', '.join(names)}): type "
                        f"{quoting.override('rule', example)} for the best {names[0]} within it, or "
                        f"{quoting.override(f'{key_prefix}objective', names[0])}")
    return left[0]


def reason_broken(trial: Trial, conditions: Sequence[Condition]) -> str | None:
    """Return why a trial does not satisfy all conditions of a rule; None if it does."""
    return "; ".join(filter(None, (condition.reason_broken(trial) for condition in conditions))) or None


def _example(name: str) -> str:
    return f"{name}{'<=' if better_direction(name).value == 'min' else '>='}0.1"


def _form(part: str) -> str:
    return f"rule must be conditions such as class_drift<=0.1, not {part.strip()!r}: type rule=\"class_drift<=0.1\""
