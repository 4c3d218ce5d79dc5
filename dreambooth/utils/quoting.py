"""Quotes values for Hydra's override grammar and for a POSIX shell. Builds every command that is printed or kept.

The value of an override passes two parsers: the shell splits a line into words, then Hydra parses each word KEY=VALUE.
A value is therefore quoted for Hydra first, and the result for the shell.
"""

import re
import shlex
from collections.abc import Iterable, Mapping

Value = str | float | bool | None
# Text that Hydra's parser returns unchanged, unless it is a number or a keyword.
_PLAIN_IN_HYDRA = re.compile(r"[\w./@%+:-]+(?: +[\w./@%+:-]+)*", re.ASCII)
_KEYWORDS = ("null", "true", "false")
_PLAIN_IN_SHELL = re.compile(r"[\w./@%+:,=-]+", re.ASCII)
_SAFE_IN_DOUBLE_QUOTES = re.compile(r"[^$`\\!]*")  # an interactive shell also expands "!" there


def hydra_string(text: str) -> str:
    """Quote a text so that Hydra's override parser, and then OmegaConf's interpolation, return exactly this text.

    In Hydra's grammar, a backslash is an escape character only before a quote and before ${, which starts an
    interpolation.
    """
    needs_single_quotes_in_shell = not _SAFE_IN_DOUBLE_QUOTES.fullmatch(text)
    mark = '"' if '"' not in text and ("'" in text or needs_single_quotes_in_shell) else "'"
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", re.sub(rf"(\\*){mark}", rf"\1\1\\{mark}", text))
    return f"{mark}{escaped}{mark}"


def hydra_value(value: Value) -> str:
    """Return a value in Hydra's grammar. A text is quoted only if Hydra's parser would change it."""
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower()
    return value if _PLAIN_IN_HYDRA.fullmatch(value) and not _is_keyword_or_number(value) else hydra_string(value)


def unescape_interpolation(text: str) -> str:
    r"""Undo the escaping of `hydra_string` in a text that Hydra has parsed: replace ``\${`` by ``${``.

    OmegaConf does the same when it resolves a value. Nothing is resolved here: ``${x}`` is returned as it is.
    """
    return re.sub(r"(\\*)\$\{", lambda match: match[1][:len(match[1]) // 2] + "${", text)


def shell_word(text: str) -> str:
    """Quote one word for a POSIX shell, if it needs quotes.

    Use double quotes. Use single quotes only if the shell would change the word inside double quotes.
    """
    if _PLAIN_IN_SHELL.fullmatch(text):
        return text
    return '"{}"'.format(text.replace('"', '\\"')) if _SAFE_IN_DOUBLE_QUOTES.fullmatch(text) else shlex.quote(text)


def shell_line(words: Iterable[str]) -> str:
    """Return the words of a command, such as sys.argv, as one line that a shell splits into these words.

    In a word of the form KEY=VALUE, only the value is quoted. Such a word is an override. It must already be in Hydra's
    grammar, because this function quotes for the shell only.
    """
    pairs = ((word, *word.partition("=")) for word in words)
    return " ".join(f"{key}={shell_word(value)}" if value and _PLAIN_IN_SHELL.fullmatch(key) else shell_word(word)
                    for word, key, _, value in pairs)


def override(key: str, value: Value) -> str:
    """Return KEY=VALUE, quoted for Hydra and then for the shell, ready to paste into a command.

    Args:
        value: the value that the command shall receive, without any quotes.
    """
    return f"{key}={shell_word(hydra_value(value))}"


def command(name: str, overrides: Mapping[str, Value]) -> str:
    """Return the line `python -m dreambooth.NAME KEY=VALUE ...`, ready to paste into a shell.

    Args:
        overrides: key -> the value that the command shall receive, without any quotes.
    """
    return " ".join([f"python -m dreambooth.{name}", *(override(key, value) for key, value in overrides.items())])


def _is_keyword_or_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in _KEYWORDS
    return True
