"""Evaluates Argo's retry expressions: the operators of the language expr-lang/expr that this project's files use.

The operators, from the weakest binding to the strongest: `||`, `&&`, comparisons (`==`, `!=`, `in`, `not in`,
`contains`, `matches`), `!` and `-`. The evaluator is stricter than Argo, which takes an unknown field of lastRetry, and
a comparison of a text with a number, for false: both raise ValueError here, as does everything that Argo rejects.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

TOKEN = re.compile(r"""\s*(?:(?P<text>"[^"\\]*"|'[^'\\]*')|(?P<number>\d+)|(?P<word>[A-Za-z_]\w*(?:\.\w+)*)"""
                   r"""|(?P<mark>\|\||&&|==|!=|[!()\[\],-]))""")
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda left, right: bool(left == right), "!=": lambda left, right: bool(left != right),
    "in": lambda left, right: left in right, "not in": lambda left, right: left not in right,
    "contains": lambda left, right: right in left, "matches": lambda left, right: bool(re.search(right, left))}


def evaluate(expression: str, last_retry: Mapping[str, str]) -> bool:
    """The value of a retry expression.

    Args:
        last_retry: the fields `status`, `exitCode`, `message` and `duration`, which Argo passes as strings.
    """
    parser = _Parser(expression, {f"lastRetry.{name}": value for name, value in last_retry.items()})
    value = parser.either()
    if parser.tokens or not isinstance(value, bool):
        raise ValueError(f"{expression} is not a condition, from {parser.tokens[:1]} on")
    return value


class _Parser:
    """A recursive descent: one method per strength of binding. Both sides of `||` and `&&` are evaluated."""

    def __init__(self, expression: str, variables: Mapping[str, str]) -> None:
        self.variables, self.tokens, position = variables, list[tuple[str, str]](), 0
        while expression[position:].strip():
            if not (found := TOKEN.match(expression, position)):
                raise ValueError(f"not in the language: {expression[position:]}")
            self.tokens.append((str(found.lastgroup), found[str(found.lastgroup)]))
            position = found.end()

    def take(self, *expected: str) -> str:
        """Remove the next token and return it, if it is one of `expected`; otherwise return an empty string."""
        return self.tokens.pop(0)[1] if self.tokens and self.tokens[0][1] in expected else ""

    def need(self, mark: str) -> None:
        if not self.take(mark):
            raise ValueError(f"{mark} is missing before {self.tokens[:1]}")

    def either(self) -> Any:
        value = self.both()
        while self.take("||"):
            value = _typed(bool, value) | _typed(bool, self.both())
        return value

    def both(self) -> Any:
        value = self.comparison()
        while self.take("&&"):
            value = _typed(bool, value) & _typed(bool, self.comparison())
        return value

    def comparison(self) -> Any:
        left = self.sign()
        if operator := self.take(*COMPARISONS, "not"):
            if operator == "not":
                self.need("in")
                operator = "not in"
            right = self.sign()
            if operator in ("contains", "matches"):
                _typed(str, left), _typed(str, right)
            elif "in" in operator:
                _typed(list, right)
            elif type(left) is not type(right):
                raise ValueError(f"{left!r} {operator} {right!r}: Argo does not compare these types")
            return COMPARISONS[operator](left, right)
        return left

    def sign(self) -> Any:
        if self.take("!"):
            return not _typed(bool, self.sign())
        return -_typed(int, self.sign()) if self.take("-") else self.operand()

    def operand(self) -> Any:
        if self.take("("):
            value = self.either()
            self.need(")")
            return value
        if self.take("["):
            values = [self.either()]
            while self.take(","):
                values.append(self.either())
            self.need("]")
            return values
        if self.take("asInt"):
            self.need("(")
            value = int(_typed(str, self.either()))
            self.need(")")
            return value
        kind, text = self.tokens.pop(0) if self.tokens else ("end", "")
        if kind == "text":
            return text[1:-1]
        if kind == "number":
            return int(text)
        if text not in self.variables:
            raise ValueError(f"{text or 'the end'} is not a value that Argo knows")
        return self.variables[text]


def _typed(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not of type {kind.__name__}")
    return value
