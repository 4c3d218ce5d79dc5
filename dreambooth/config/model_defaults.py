"""Defaults that the files conf/model/*.yaml set. Imports neither torch nor Hydra."""

from functools import cache
from typing import Any

import yaml

from dreambooth.config.schema import Model, Prior, Train
from dreambooth.utils.assets import conf_dir


@cache
def default_sample_batch_size(model: str) -> int:
    """Return the default of prior.sample_batch_size for a model.

    If the file conf/model/MODEL.yaml sets prior.sample_batch_size, return its value. Otherwise return the default in
    schema.py.

    The size of a batch changes the last bits of the images in it. Class images that are generated with another batch
    size are therefore stored in another folder, see `sample_batch_size_if_changed`.

    Args:
        model: the value of model.name. It is the name of the file, without .yaml.
    """
    return int(_section(model, "prior").get("sample_batch_size", Prior.sample_batch_size))


@cache
def default_learning_rate(model: str) -> float:
    """Return the default of train.learning_rate for a model whose weights are all trained by AdamW.

    If the file conf/model/MODEL.yaml sets train.learning_rate, return its value. Otherwise return the default in
    schema.py.

    Args:
        model: the value of model.name. It is the name of the file, without .yaml.
    """
    return float(_section(model, "train").get("learning_rate", Train.learning_rate))


@cache
def default_resolution(model: str) -> int:
    """Return model.resolution of the file conf/model/MODEL.yaml, in pixels; without one, the default in schema.py."""
    return int(_section(model, "model").get("resolution", Model.resolution))


def names() -> list[str]:
    """Return the names of all files in conf/model, without .yaml."""
    return sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))


def sample_batch_size_if_changed(model: str, size: int) -> dict[str, int]:
    """Return {"sample_batch_size": size}, or an empty dictionary if `size` is the default of the model.

    The caller hashes the dictionary together with other settings. Earlier versions of this package did not hash the
    batch size. The dictionary is empty for the default, so that a run with the default still has the same hash as in
    these versions.
    """
    return {} if size == default_sample_batch_size(model) else {"sample_batch_size": size}


def _section(model: str, name: str) -> dict[str, Any]:
    """Return the settings of a section, such as train, in the file conf/model/MODEL.yaml; {} if there are none."""
    path = conf_dir() / "model" / f"{model}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")).get(name, {}) if path.is_file() else {}
