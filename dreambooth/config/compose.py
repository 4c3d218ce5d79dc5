"""Where Hydra's composed configuration becomes plain dataclasses, and where conf/ is found. No torch.

`load` is the border: a DictConfig goes in, dataclasses come out. Below the doors nobody knows Hydra.
"""

import json
import re
from contextlib import suppress
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth.config import eval_prompts
from dreambooth.config.dataset import ALPHA, FOLDERS
from dreambooth.config.schema import Config
from dreambooth.config.storage import is_remote
from dreambooth.data.photos import fingerprint
from dreambooth.errors import ConfigError, UserError
from dreambooth.utils.assets import asset
from dreambooth.utils.atomic_files import weights_digest

_SECRET = ("would be kept in .hydra/ with its password: type the address without it and set MLFLOW_TRACKING_USERNAME "
           "and MLFLOW_TRACKING_PASSWORD, or type tracking.uri='${oc.env:MLFLOW_TRACKING_URI}'")

NEWER: dict[str, Any] = {
    "dataset.mask": None, "dataset.concepts": [], "dataset.buckets": False, "dataset.prompt_dropout": 0.0,
    "precision.tf32": False}  # keys that came later, and where they change nothing: runs keep their folders
UNCHANGED = {"ema_every": 1, "weights": "full", "rounding": None}  # levers that change numbers, and when they do not
UNSEEN = ("offline", "objective", "promote", "max_class_similarity")  # of evaluate: they choose no weights


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


def identity(root: DictConfig, swept: bool = False) -> str:
    """Ten hex digits over everything that changes the result of a run, the photos' content included.

    Left out: how it is computed (hardware, and of memory what changes no number), what is only looked at (sample,
    tracking, checkpoint, evaluate as long as it does not select what is exported), and `max_train_steps` as long as the
    learning rate does not depend on it, so that more steps extend a run. In a sweep that chooses `max_train_steps` each
    choice is a run of its own.
    """
    def plain(section: str) -> dict[str, Any]:
        found: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            root[section], resolve=True, enum_to_str=True)
        return found

    chosen = {name: plain(name) for name in (
        "model", "method", "precision", "attention", "optimizer", "dataset", "prior", "train")}
    if changed := {key: value for key, value in plain("memory").items() if value != UNCHANGED.get(key, value)}:
        chosen["memory"] = changed
    chosen["prior"].pop("sample_batch_size")
    for key in ("compile", "channels_last"):  # they round differently: only a run that has them is told apart
        if not chosen["train"][key]:
            chosen["train"].pop(key)
    if not swept and chosen["train"]["lr_scheduler"] in ("constant", "constant_with_warmup"):
        chosen["train"].pop("max_train_steps")
    for key in ("offline", "adapter_learning_rate"):  # the latter is in train.learning_rate, where it is used
        chosen["model"].pop(key)
    for key in ("vae", "zero_terminal_snr"):  # younger than the first runs
        if not chosen["model"][key]:
            chosen["model"].pop(key)
    if (vae := chosen["model"].get("vae")) and (digest := weights_digest(Path(asset(vae)))):
        chosen["model"]["vae_weights"] = digest
    chosen["method"].pop("merge")
    if chosen["method"]["kind"] == "full":
        chosen["method"] = {key: chosen["method"][key] for key in ("name", "kind")}
    chosen["model"]["weights"] = weights_digest(Path(asset(chosen["model"]["source"])))
    for place, value in NEWER.items():
        section, _, key = place.partition(".")
        if chosen[section][key] == value:
            chosen[section].pop(key)
    for subject in (chosen["dataset"], *chosen["dataset"].get("concepts", ())):
        for key in FOLDERS:
            if (folder := subject.get(key)) and folder != ALPHA:
                subject[key] = _photos(folder)
    if (evaluate := plain("evaluate"))["select"] is not None:
        chosen["evaluate"] = _selection(evaluate) | {
            key: root.sample[key] for key in ("num_inference_steps", "guidance_scale")}
    return sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _selection(evaluate: dict[str, Any]) -> dict[str, Any]:
    """What decides which weights are exported, once evaluate.select does."""
    kept = {key: value for key, value in evaluate.items() if key not in UNSEEN}
    if folder := kept["reference_dir"]:
        kept["reference_dir"] = _photos(folder)
    with suppress(ValueError):  # said when the run is resolved
        kept["prompts"] = eval_prompts.read(kept["prompts"])
    return kept


def _photos(folder: str) -> str:
    """A folder by its content; by its address where that would have to be fetched first, see remote.py."""
    return folder if is_remote(folder) else fingerprint(Path(asset(folder)))


def _identity_resolver(place: str = "", *, _root_: DictConfig) -> str:
    """${identity:} of a run, ${identity:sweep} of a trial."""
    task = _root_.hydra.overrides.task if place == "sweep" else []
    return identity(_root_, swept=any(word.lstrip("+").startswith("train.max_train_steps=") for word in task))


OmegaConf.register_new_resolver("identity", _identity_resolver, replace=True)
ConfigStore.instance().store(name="schema", node=Config, provider="dreambooth")
# Hydra copies what it asks, this store of all schemas included, about a hundred times for --help: half of its time. The
# store is one for the process, and what is loaded from it is a copy already.
ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
