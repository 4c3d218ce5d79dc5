"""Where Hydra's composed configuration becomes plain dataclasses, and where conf/ is found. No torch.

`load` is the border: a DictConfig goes in, dataclasses come out. Below the doors nobody knows Hydra.
"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth.config.schema import Config
from dreambooth.errors import ConfigError, UserError

_SECRET = ("would be kept in .hydra/ with its password: type the address without it and set MLFLOW_TRACKING_USERNAME "
           "and MLFLOW_TRACKING_PASSWORD, or type tracking.uri='${oc.env:MLFLOW_TRACKING_URI}'")

Asked = TypeVar("Asked")


def conf_dir() -> Path:
    """conf/ inside the package once installed, beside it in a checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def asked(cfg: Any, kind: type[Asked]) -> Asked:
    """What a door that composes no run was asked for, checked.

    Raises:
        UserError: a value is of the wrong kind, or breaks a rule of its field.
    """
    try:
        found = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(found, kind)
    return found


def load(cfg: DictConfig) -> Config:
    """Turn a composed DictConfig into a Config.

    Raises:
        ConfigError: a value breaks a rule of its own field, or +key=value added a key that nobody reads;
            each sentence names the key.
    """
    problems = [f"tracking.uri {_SECRET}"] * typed_password(cfg)
    problems += [f"{key} is not a setting: type a key that --cfg job shows" for key in _unknown(cfg)]
    sections: dict[str, Any] = {}
    for item in fields(Config):
        try:
            node = OmegaConf.select(cfg, item.name)
            sections[item.name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        except (ValueError, OmegaConfBaseException) as error:
            problems += str(error).splitlines() if isinstance(error, ValueError) else [str(error).splitlines()[0]]
    if problems:
        raise ConfigError(*problems)
    return Config(**sections)


def search_space(name: str) -> dict[str, tuple[str, ...]]:
    """conf/sweep/NAME.yaml as key -> its values, each as Hydra's own sweeper would type it.

    Raises:
        UserError: there is no such file, or it says anything but choice(...): the end of a range belongs to it for
            Optuna and not for the basic sweeper, which does not know an interval at all.
    """
    file = conf_dir() / "sweep" / f"{name}.yaml"
    if not file.is_file():
        options = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise UserError(f"there is no search space {name}: type sweep= one of {options}")
    found = {}
    for key, text in (OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") or {}).items():
        override = OverridesParser.create().parse_override(f"{key}={text}")
        if not override.is_choice_sweep():
            raise UserError(f"sweep={name} has {key}: {text}: type choice(...) there, which every sweeper understands")
        found[str(key)] = tuple(value for value in override.sweep_string_iterator())
    return found


def typed_password(cfg: DictConfig) -> bool:
    """True if tracking.uri was typed with a password in it, which Hydra would keep in .hydra/."""
    uri = str(OmegaConf.to_container(cfg).get("tracking", {}).get("uri"))  # type: ignore[union-attr]
    return bool(re.search(r"://[^/\s]*:[^/\s]+@|password=.", re.sub(r"\$\{[^}]*\}", "", uri)))


def _unknown(cfg: DictConfig) -> list[str]:
    known: dict[str, Any] = {item.name: vars(item.default_factory()) if is_dataclass(item.default_factory) else None
                             for item in fields(Config)}
    return [*(str(key) for key in cfg if key not in known),
            *(f"{name}.{key}" for name, keys in known.items() if keys and name in cfg
              for key in cfg[name] if key not in keys)]


ConfigStore.instance().store(name="schema", node=Config, provider="dreambooth")
# Hydra copies what it asks, this store of all schemas included, about a hundred times for --help: half of its time. The
# store is one for the process, and what is loaded from it is a copy already.
ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
