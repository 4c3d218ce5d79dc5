"""Turns the configuration that Hydra composed into plain dataclasses.

The rest of the package works with these dataclasses: apart from the commands, only this module, launcher.py,
overrides.py, runs/identity.py and sweeps/hydra_callbacks.py import Hydra or OmegaConf. This module does not
import torch.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, Transformer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth.config import overrides
from dreambooth.config.enums import MethodKind
from dreambooth.config.model_defaults import default_learning_rate
from dreambooth.config.schema import Config
from dreambooth.errors import ConfigError, UserError
from dreambooth.utils.assets import conf_dir as conf_dir
from dreambooth.utils.key_names import short_names
from dreambooth.utils.quoting import unescape_interpolation

_LOGIN_IN_URI = (
    "contains a password or token, which would be stored in .hydra/: type the address without it and set "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or type tracking.uri='${oc.env:MLFLOW_TRACKING_URI}'")

Options = TypeVar("Options")


@contextmanager
def composed(words: Sequence[str], *fixed: str) -> Iterator[DictConfig]:
    """Compose a run from overrides, for a `with` block that reads the configuration.

    An instance of Hydra that is already in use in this process stays in use.

    Args:
        words: overrides, as users type them.
        fixed: further overrides in Hydra's grammar, which come before `words`.

    Yields:
        The configuration, with the config group hydra.

    Raises:
        UserError: Hydra cannot compose the overrides, or the block reads a value that cannot be resolved.
    """
    words = overrides.prepare(words, Config)
    in_use = dict(GlobalHydra.instance().__dict__)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("config", [*fixed, *words], return_hydra_config=True)
        yield config
    except Exception as error:
        known = overrides.explain(error, Config, words)
        if known is None or known is error:
            raise
        raise known from error
    finally:
        GlobalHydra.instance().__dict__.update(in_use)


def to_dataclass(cfg: Any, kind: type[Options]) -> Options:
    """Convert the options of a command to a dataclass of type `kind`. For the configuration of a run, use `load`.

    Raises:
        UserError: a value has the wrong type, or breaks a rule of its field.
    """
    overrides.escape_prompts(cfg)
    try:
        options = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(overrides.explain_value(error, kind)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(options, kind)
    return options


def to_aliased_dataclass(cfg: DictConfig, kind: type[Options]) -> Options:
    """Convert the options of a command as `to_dataclass` does, if keys such as `in` cannot be field names in Python.

    Args:
        kind: the dataclass; its attribute `aliases` is a dictionary from key to field name.

    Raises:
        UserError: as in `to_dataclass`.
    """
    aliases = getattr(kind, "aliases", {})
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), {aliases.get(key, key): cfg[key] for key in cfg})
    except OmegaConfBaseException as error:
        raise UserError(overrides.explain_value(error, kind)) from error
    return to_dataclass(merged, kind)


def read_options(words: Sequence[str], kind: type[Options]) -> Options:
    """Return the options of a command that overrides set. Other options have the defaults of the dataclass.

    Args:
        words: overrides KEY=VALUE of existing keys, as users type them.

    Raises:
        UserError: a value has the wrong type, or breaks a rule of its field.
    """
    cfg = OmegaConf.structured(kind)
    for word in overrides.prepare(words, kind):
        override = overrides.parse(word)
        assert override is not None  # prepare has checked it
        try:
            OmegaConf.update(cfg, override.key_or_group, override.value())
        except OmegaConfBaseException as error:
            raise UserError(overrides.explain_value(error, kind, word)) from error
    return to_dataclass(cfg, kind)


def load(cfg: DictConfig) -> Config:
    """Return the Config of a run, built from the configuration that Hydra composed.

    Raises:
        ConfigError: a value breaks a rule of its field, the user has added (with +key=value) a key that is not in
            the schema, or tracking.uri contains a password. The message has one line per problem, and each line
            names a key.
    """
    problems = [f"tracking.uri {_LOGIN_IN_URI}"] * uri_has_password(cfg)
    problems += [overrides.unknown_key(key, "VALUE", Config) for key in _unknown_keys(cfg)]
    overrides.escape_prompts(cfg)
    sections: dict[str, Any] = {}
    for item in fields(Config):
        try:
            node = OmegaConf.select(cfg, item.name)
            sections[item.name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            problems.append(overrides.explain_value(error, Config))
        except ValueError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError(*problems)
    return Config(**sections)


@dataclass(frozen=True)
class SearchSpace:
    """The search space of a sweep, as defined in conf/sweep/NAME.yaml."""

    name: str
    values: Mapping[str, tuple[str, ...]]  # configuration key -> values in the grammar of overrides
    logarithmic: frozenset[str] = frozenset()  # keys whose values SageMaker's tuner scales logarithmically

    def without_overridden(self, overrides: Sequence[str]) -> "SearchSpace":
        """Return the search space without the keys that `overrides` sets.

        An override sets its key to the same value in all trials, also with Hydra's sweepers.
        """
        fixed = {override.partition("=")[0].lstrip("+") for override in overrides}
        return replace(self, values={key: values for key, values in self.values.items() if key not in fixed})

    def numbers(self, key: str) -> list[int | float] | None:
        """Return the values of a key as the numbers that a run reads; None if one of them is not a finite number."""
        parsed = [overrides.parse(f"{key}={text}") for text in self.values[key]]
        found = [override and override.value() for override in parsed]
        numbers = [value for value in found
                   if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf]
        return numbers if len(numbers) == len(found) else None

    def trials(self) -> list[tuple[str, ...]]:
        """Return one tuple of overrides per point of the search space, in the order of Hydra's basic sweeper."""
        choices = [[f"{key}={value}" for value in values] for key, values in self.values.items()]
        return [(f"sweep={self.name}", *trial) for trial in itertools.product(*choices)]


def search_space(name: str) -> SearchSpace:
    """Read a search space from conf/sweep/NAME.yaml, where NAME is `name`. It holds the values that a sweep tries.

    Only choice(...) is allowed, because sweepers treat other forms differently: Optuna includes the end of a
    range, but Hydra's basic sweeper does not. The basic sweeper does not support intervals. tag(log,choice(...)) is a
    choice too; the tag concerns SageMaker's tuner only.

    Returns:
        The search space. Its values are the strings that the basic sweeper writes into overrides.

    Raises:
        UserError: there is no such file, or it contains a form other than choice(...).
    """
    file = conf_dir() / "sweep" / f"{name}.yaml"
    if not file.is_file():
        available = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise UserError(f"there is no search space {name}: type sweep=NAME with one of {available}")
    values, logarithmic = {}, set()
    for key, text in (OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") or {}).items():
        if (override := overrides.parse(f"{key}={text}")) is None:
            raise UserError(f"sweep={name} contains {key}: {text}, which Hydra cannot read: {overrides.QUOTED_CHOICES}")
        if not override.is_choice_sweep():
            raise UserError(f"sweep={name} contains {key}: {text}: type choice(...) there, "
                            "which every sweeper supports")
        values[str(key)] = tuple(choice_texts(override))
        choices = override.value()
        if isinstance(choices, ChoiceSweep) and "log" in choices.tags:
            logarithmic.add(str(key))
    return SearchSpace(name, values, frozenset(logarithmic))


def choice_texts(choices: Override) -> list[str]:
    """Return the values of choice(...), as Hydra's sweeper writes them into the overrides of its jobs.

    Hydra drops the quotes of a text in choice(...). If it could then not read the text in an override, for example
    because the text contains an apostrophe, the text gets its quotes back.
    """
    key, texts = choices.get_key_element(), []
    for item in choices.sweep_iterator():
        text = Transformer.str(item)
        if isinstance(item, str) and overrides.parse(f"{key}={text}") is None:
            text = QuotedString(item, Quote.double).with_quotes()
        texts.append(text)
    return texts


def name_trial(trial: Sequence[str]) -> str:
    """Return the name of a trial's MLflow run, such as "learning_rate=1e-06 max_train_steps=400".

    Args:
        trial: the overrides of the trial. The name of the search space (sweep=NAME) is left out of the result.
    """
    values = {key: unquote(override) for override in trial if (key := override.partition("=")[0]) != "sweep"}
    return " ".join(f"{name}={values[key]}" for key, name in short_names(values).items())


def unquote(override: str) -> str:
    """Return VALUE of an override KEY=VALUE as plain text, without the quotes and escapes of Hydra's grammar."""
    raw = override.partition("=")[2]
    if not raw.startswith(("'", '"')) and "\\" not in raw:
        return raw
    parsed = overrides.parse(override)
    text = parsed.value() if parsed else raw
    return unescape_interpolation(text) if isinstance(text, str) else raw


def uri_has_password(cfg: DictConfig) -> bool:
    """Return whether tracking.uri contains a literal password, which Hydra would store in .hydra/."""
    uri = str(OmegaConf.to_container(cfg).get("tracking", {}).get("uri"))  # type: ignore[union-attr]
    return bool(re.search(r"://[^/\s]*:[^/\s]+@|https?://[^/\s]+@|(password|token)=.", re.sub(r"\$\{[^}]*\}", "", uri)))


def _unknown_keys(cfg: DictConfig) -> list[str]:
    """Return the keys of `cfg` that are not in the schema."""
    schema: dict[str, Any] = {item.name: vars(item.default_factory()) if is_dataclass(item.default_factory) else None
                              for item in fields(Config)}
    return [*(str(key) for key in cfg if key not in schema),
            *(f"{name}.{key}" for name, keys in schema.items() if keys and name in cfg
              for key in cfg[name] if key not in keys)]


def _adamw_rate(factor: float, *, _root_: DictConfig) -> float:
    """Return the value of ${adamw_rate:FACTOR}: FACTOR times the model's default learning rate with AdamW.

    An adapter has another default than full training. Files in conf/optimizer/ use this value, because a good learning
    rate of some optimizers is a known multiple of AdamW's.
    """
    full = _root_.method.kind in (MethodKind.full, MethodKind.full.value)
    rate = default_learning_rate(_root_.model.name) if full else _root_.model.adapter_learning_rate
    return float(f"{factor * rate:.6g}")  # 3e-05 instead of 3.0000000000000004e-05


OmegaConf.register_new_resolver("adamw_rate", _adamw_rate, replace=True)
ConfigStore.instance().store(name="schema", node=Config, provider="dreambooth")
# For --help, Hydra deep-copies its config repository about a hundred times, and with it this store of all schemas. That
# took half of the run time of --help. No copy is needed, because the store is a singleton, and `load` returns copies.
ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
