"""Overrides KEY=VALUE as users type them: checks them, and turns Hydra's errors into sentences that say what to type.

Beside compose.py, this is the only file in this folder that knows Hydra's grammar and errors.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException, SearchPathException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from dreambooth.errors import ConfigError, DreamBoothError, UserError
from dreambooth.utils import quoting
from dreambooth.utils.assets import conf_dir, expand_home
from dreambooth.utils.atomic_files import write_failure
from dreambooth.utils.suggestions import closest, one_of

# Keys whose values are prompts or titles. A prompt is text: `${word}` in it is not an interpolation, and `~` is not the
# home folder.
TEXT_KEYS = re.compile(
    r"dataset\.(concepts\.\d+\.)?(instance|class)_prompt|sample\.prompts(\.\d+)?|prompt|negative_prompt|title"
    r"|captions\.prompt|masks\.text|class_word")
_HELP = "type --help for all keys"
QUOTED_CHOICES = 'type choice("TEXT","TEXT") there, each text in double quotes'


# -- before Hydra reads them ----------------------------------------------------------------------------------------

def prepare(words: Sequence[str], kind: type) -> list[str]:
    """Rewrite overrides so that Hydra reads from them what the user means.

    - In a path, `~` becomes the home folder; shells expand it only at the start of a word.
    - In a prompt, `${` is escaped, so that it is text and not an interpolation.
    - If the value of a text setting looks like a number or a boolean, it is quoted, so that 1.50 does not become 1.5.

    Args:
        words: the overrides, as typed.
        kind: dataclass of the configuration.

    Raises:
        ConfigError: some of `words` are not overrides that Hydra can read. The message has one line per problem.
    """
    if (split := next((number for number, word in enumerate(words) if "=" not in word and word[:1] != "~"), None)
            ) is not None:
        raise ConfigError(_not_an_override(words, split, kind))
    prepared, problems = [], []
    for word in words:
        try:
            prepared.append(_prepare(word, kind))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(*problems)
    return prepared


def _prepare(word: str, kind: type) -> str:
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{word.encode(errors='replace').decode()} is not valid UTF-8: type its text again") from error
    key, equals, raw = word.partition("=")
    name = key.lstrip("+~").partition("@")[0]
    if not name:
        raise UserError(f"{word} has no key: type KEY=VALUE; {_HELP}")
    if key.startswith("~") and not name.startswith("hydra"):
        raise UserError(f"{name} cannot be removed: type {name}=VALUE, or leave {word} out")
    is_text = TEXT_KEYS.fullmatch(name) is not None
    value = escape_interpolations(raw) if is_text else _expand_home(raw)
    if name == "dataset.concepts":
        value = re.sub(r"_prompt\s*:\s*('(\\.|[^'])*'|\"(\\.|[^\"])*\"|[^,}]*)",
                       lambda found: escape_interpolations(found[0]), value)
    candidates = [value, *([quoting.hydra_string(expand_home(raw))] if value != raw and raw[0] == "~" else [])]
    for candidate in candidates:
        if parsed := parse(f"{key}{equals}{candidate}"):
            hint, is_number = setting_type(kind, name), type(parsed.value()) in (int, float)
            if hint in (bool, bool | None) and is_number and parsed.value() not in (0, 1):
                raise UserError(f"{name} must be {expected_form(hint)}, not {raw}")  # OmegaConf takes 2 for true
            is_text = is_text or hint in (str, str | None)
            if is_text and not parsed.is_sweep_override() and isinstance(parsed.value(), int | float):
                return f"{key}={quoting.hydra_string(raw.strip())}"
            return f"{key}{equals}{candidate}"
    raise UserError(_not_in_grammar(key, name, raw, kind))


def parse(override: str) -> Override | None:
    """Return an override as Hydra parses it; None if it is not valid in Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _expand_home(value: str) -> str:
    """Replace `~` and `~user` at the start of a value, and of each item of a list, by the home folder."""
    return re.sub(r"(^|[\[,:]\s*|^['\"]|[\[,:]\s*['\"])(~[\w.-]*)(?=[/,\]'\"]|$)",
                  lambda found: found[1] + expand_home(found[2]), value)


def escape_interpolations(text: str) -> str:
    """Return a text in which every `${` is escaped, so that OmegaConf reads it as these two characters.

    A `${` after an odd number of backslashes is escaped already.
    """
    return re.sub(r"(\\*)\$\{", lambda found: found[0] if len(found[1]) % 2 else f"{found[1]}\\${{", text)


def _not_an_override(words: Sequence[str], number: int, kind: type) -> str:
    """Return a sentence about `words[number]`, which has no `=`. Most likely the shell has split a value at a blank."""
    word = words[number]
    if word in setting_keys(kind):
        return f"{word} has no value: type {word}=VALUE"
    key, equals, _ = words[number - 1].partition("=") if number else ("", "", "")
    if equals and setting_type(kind, key.lstrip("+")) in (str, str | None):
        end = next((end for end in range(number, len(words)) if "=" in words[end]), len(words))
        value = " ".join(words[number - 1:end]).partition("=")[2]
        return (f"{word} is not KEY=VALUE, and a value with blanks needs quotes: type "
                f"{quoting.override(key, _plain(value))}")
    path = next((key for key in ("run", "in", "dataset.instance_dir") if key in setting_keys(kind)), None)
    if path and Path(word).exists():
        return f"{word} is not KEY=VALUE: type {quoting.override(path, word)}"
    return f"{word} is not KEY=VALUE: {_HELP}"


def _not_in_grammar(key: str, name: str, raw: str, kind: type) -> str:
    if (found := re.search(r"\s([\w./]+)=\S", raw)) and (
            setting_type(kind, found[1]) is not None or found[1] in _group_names(kind)):
        return f"{key}={raw} is several overrides in one word: type them without quotes around all of them"
    if parse(f"{key}={quoting.hydra_string(_plain(raw))}") is None:
        return unknown_key(name, raw, kind)
    if raw[:1] in ("[", "{") and "list[" in (form := str(setting_type(kind, name))):
        return f'the value of {key} is not a list that Hydra can read: type {key}="[{_example_item(form)}]"'
    return f"the value of {key} needs quotes, for Hydra and for the shell: type {quoting.override(key, _plain(raw))}"


def _plain(raw: str) -> str:
    """Return a value as plain text: without Hydra's quotes around it, and with `${` not escaped."""
    quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\""
    return (raw[1:-1] if quoted else raw).replace("\\${", "${")


def escape_prompts(cfg: DictConfig) -> None:
    """Escape `${` in the values of TEXT_KEYS in a configuration, such as prompts that a YAML file sets."""
    with read_write(cfg), open_dict(cfg):
        for key, text in _texts(OmegaConf.to_container(cfg, resolve=False), ""):
            if "${" in text and TEXT_KEYS.fullmatch(key) and (escaped := escape_interpolations(text)) != text:
                OmegaConf.update(cfg, key, escaped)


def _texts(content: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the value of every string in nested dictionaries and lists."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict | list):
        for name, item in content.items() if isinstance(content, dict) else enumerate(content):
            if name != "hydra" or key:
                yield from _texts(item, f"{key}.{name}" if key else str(name))


# -- after Hydra has read them --------------------------------------------------------------------------------------

def explain(error: Exception, kind: type, words: Sequence[str] = ()) -> DreamBoothError | None:
    """Turn an exception into an error whose message tells the user what to type.

    The message says in one sentence what Hydra, OmegaConf or the operating system has refused.

    Args:
        error: the exception that was raised while a configuration was composed or the run folder was written.
        kind: dataclass of the configuration.
        words: all overrides that the user typed.

    Returns:
        The error to raise, or None if `error` is an internal fault.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:  # `raise e from e` is a loop
        chain.append(cause)
    if isinstance(known := next((one for one in chain if isinstance(one, DreamBoothError)), None), DreamBoothError):
        return known
    if isinstance(error, HydraException):
        return UserError(_explain_hydra(error, kind, words))
    if isinstance(error, OmegaConfBaseException):
        return UserError(explain_value(error, kind, words=words))
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):
        for word in words:
            key, _, raw = word.lstrip("+").partition("=")
            if (conf_dir() / key).is_dir() and isinstance(parsed := parse(word), Override) \
                    and not isinstance(parsed.value(), str):
                options = sorted(path.stem for path in (conf_dir() / key).glob("*.yaml"))
                return UserError(_unknown_option(key, raw, options))
    if isinstance(error, OSError):
        return write_failure(str(error.filename or "the run folder"), error,
                             "type run_root=DIR, a folder that you can write to")
    return None


def _explain_hydra(error: HydraException, kind: type, words: Sequence[str]) -> str:
    message, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return _unknown_option(group, option, error.options) if error.options else (
            f"there is no configuration {error.missing_cfg_file}: leave --config-name out")
    if isinstance(error, OverrideParseException):
        key, _, raw = str(error.override).partition("=")
        if any(word.partition("=")[0] == key for word in words):
            return _not_in_grammar(key, key.lstrip("+~").partition("@")[0], raw, kind)
        return f"the search space contains {key}: {raw}, which Hydra cannot read: {QUOTED_CHOICES}"
    if isinstance(error, SearchPathException):
        return f"{_one_line(message)}: type --config-dir DIR, a folder that is there"
    if found := re.match(r"(?:.*: )?Could not (?:override|delete)[^']*'([^']+)'", message):
        word = next((word for word in words if word.lstrip("+").partition("=")[0] == found[1]), "")
        if isinstance(cause, OmegaConfBaseException) and setting_type(kind, found[1]) is not None:
            return explain_value(cause, kind, word, words)
        return unknown_key(found[1], word.partition("=")[2], kind)
    if found := re.match(r"Override (.+) looks like a config group override", message, re.DOTALL):
        key, _, value = found[1].partition("=")
        return unknown_key(key.partition("@")[0], value, kind)
    if found := re.match(r"(?:.*: )?(?:Could not append to config. An item is already at '|Multiple values for )"
                         r"([\w./]+\w)", message):
        return f"{found[1]} is a setting already: type it without +"
    if found := re.match(r"Ambiguous value for argument '(.*)'\n1\.", message, re.DOTALL):
        key, _, value = found[1].partition("=")
        hint = setting_type(kind, key)
        advice = f'{key}="[{value}]"' if "list[" in str(hint) else (
            f"{quoting.override(key, _plain(value))}, or add -m for a sweep" if hint in (str, str | None)
            else "one value, or add -m for a sweep")
        return f"the value of {key} has a comma, which separates the values of a sweep: type {advice}"
    if re.match(r"In '[^']*': Could not find|You must specify", message):
        return _one_line(message)
    if found := re.match(r"Sweep parameters '(.*)' requires --multirun", message, re.DOTALL):
        return f"{found[1]} is a sweep: add -m, or type one value"
    if isinstance(cause, OmegaConfBaseException):
        found = re.match(r"Error merging override (.+)", message, re.DOTALL)
        return explain_value(cause, kind, found[1] if found else "", words)
    return _one_line(message or str(cause)).removeprefix("dreambooth: ")  # a message of our launcher


def explain_value(error: OmegaConfBaseException, kind: type, word: str = "", words: Sequence[str] = ()) -> str:
    """Return one sentence about a value that OmegaConf has refused: its key, and the form that its key expects.

    Args:
        kind: dataclass of the configuration.
        word: the override that contains the value; "" if it is unknown.
        words: all overrides that the user typed.
    """
    typed, _, raw = word.partition("=")
    key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or typed.lstrip("+~")))
    key = {field: alias for alias, field in _aliases(kind).items()}.get(key, key)
    reason = re.sub(r'^\w+ (?:raised )?while resolving interpolation: "?|"$', "", _one_line(str(error)))
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        if "list[" in (form := str(setting_type(kind, typed))):
            return f'{reason}: type {typed}="[{_example_item(form)}]"'
        return unknown_key(key, raw, kind)
    if isinstance(error, InterpolationResolutionError):
        key = next((word.partition("=")[0] for word in words if re.search(r"\$\{|=\?\?\?$", word)), key)
        if reason.startswith("Missing mandatory value"):
            return f"{key}=??? stands for a missing value: type {key}=VALUE"
        return f"{key} contains an interpolation that cannot be resolved ({reason}): type {key}=VALUE"
    if isinstance(error, GrammarParseError):
        return f"{typed or key} contains ${{ without a matching }}: type \\${{ for the characters ${{"
    if isinstance(error, MissingMandatoryValue):
        return f"{reason}: type {key}=VALUE"
    value = raw if word else error.value
    hint = setting_type(kind, key)
    if re.match(r"dataset\.concepts\.\d", key):
        return f'{key} is no subject yet: type dataset.concepts="[{_example_item("Subject")}]", with all subjects'
    if is_dataclass(hint):
        return f"{key} is a group of settings: type {key}.KEY=VALUE; --help lists the keys"
    if not (form := expected_form(hint)):
        return f"{key}: {reason}: {_HELP}"
    options = enum_options(hint)
    near = closest(str(value), options) if options else []
    meant = f": did you mean {key}={near[0]}?" if near else ""
    if raw and hint in (str, str | None):
        meant = f": type {quoting.override(key, _plain(raw))}"
    if raw and "list[str]" in str(hint):
        meant = f": type {quoting.shell_line([f'{key}=[{quoting.hydra_string(_plain(raw))}]'])}"
    return f"{key} must be {form}, not {'empty' if value == '' else value}{meant}"


def expected_form(hint: Any) -> str:
    """Return what a setting of the type `hint` accepts, as the end of the sentence "KEY must be ...".

    Return "" if there is no description for this type.
    """
    if get_origin(hint) in (Union, UnionType):
        first = next(one for one in get_args(hint) if one is not NoneType)
        form = expected_form(first)
        return f"{form}, or null" if form and NoneType in get_args(hint) else form
    if options := enum_options(hint):
        return one_of(options)
    if get_origin(hint) is list:
        return f"a list such as [{_example_item(str(hint))}]"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(hint, "")


def _example_item(hint: str) -> str:
    return "'a text','another text'" if "str" in hint else "{instance_dir: 'DIR', instance_prompt: 'TEXT'}"


def enum_options(hint: Any) -> list[str]:
    """Return the values of an enum type, or of the enum in an optional type; an empty list for other types."""
    for one in get_args(hint) or (hint,):
        if isinstance(one, type) and issubclass(one, Enum):
            return [str(member.value) for member in one]
    return []


def setting_type(kind: type, key: str) -> Any:
    """Return the type of a setting by its key, such as int for train.seed; None if there is no such setting."""
    hint: Any = kind
    for part in key.split("."):
        item = next((one for one in get_args(hint) if one is not NoneType), None)
        if get_origin(hint) is list and part.isdecimal():
            hint = item
        elif is_dataclass(hint):
            hint = get_type_hints(hint).get(_aliases(kind).get(part, part))
        else:
            return None
    return hint


def setting_keys(kind: type, prefix: str = "") -> list[str]:
    """Return the keys of all settings of a configuration, such as train.seed."""
    names = {field: alias for alias, field in _aliases(kind).items()}
    keys: list[str] = []
    for name, hint in get_type_hints(kind).items():
        is_section = isinstance(hint, type) and is_dataclass(hint)
        keys += setting_keys(hint, f"{prefix}{name}.") if is_section else [prefix + names.get(name, name)]
    return keys


def _aliases(kind: type) -> dict[str, str]:
    """Return a dictionary from key to field name, for keys such as `in`, which cannot be field names in Python."""
    return getattr(kind, "aliases", {})


def unknown_key(key: str, value: str, kind: type) -> str:
    """Return one sentence about a key that is not a setting, with the settings that the user most likely meant."""
    if key.startswith("hydra"):
        return f"there is no setting {key}: type --cfg hydra for all of Hydra's keys"
    choices = [*setting_keys(kind), *_group_names(kind)]
    if not (near := closest(key, [choice for choice in choices if choice != key])):
        return f"there is no setting {key}: {_HELP}"
    meant = one_of(quoting.shell_line([f"{name}={value}"]) for name in near)
    return f"there is no setting {key}: did you mean {meant}?"


def _group_names(kind: type) -> list[str]:
    """Return the names of the config groups, or [] if `kind` is not the dataclass of a run's configuration."""
    return [path.name for path in sorted(conf_dir().iterdir())
            if path.is_dir() and path.name != "hydra" and is_dataclass(setting_type(kind, "train"))]


def _unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    near = closest(option, options, 1, cutoff=0.5)
    meant = f"did you mean {group}={near[0]}? The options" if near else "the options"
    return f"there is no {group}={option}: {meant} are {', '.join(options)}"


def _one_line(message: str) -> str:
    return " ".join(message.split("\n    ")[0].split())
