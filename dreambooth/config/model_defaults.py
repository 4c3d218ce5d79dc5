"""Defaults that the files conf/model/*.yaml set outside of the section `model`. Imports neither torch nor Hydra."""

from functools import cache

import yaml

from dreambooth.config.schema import Prior
from dreambooth.utils.assets import conf_dir


@cache
def default_sample_batch_size(model: str) -> int:
    """Return prior.sample_batch_size as the model's file sets it, or the general default.

    The size of a batch changes the last bits of the images in it. Class images that are generated with another batch
    size are therefore stored in another folder, see `sample_batch_size_if_changed`.

    Args:
        model: the value of model.name, which is the name of the file.
    """
    path = conf_dir() / "model" / f"{model}.yaml"
    prior = yaml.safe_load(path.read_text(encoding="utf-8")).get("prior", {}) if path.is_file() else {}
    return int(prior.get("sample_batch_size", Prior.sample_batch_size))


def sample_batch_size_if_changed(model: str, size: int) -> dict[str, int]:
    """Return {"sample_batch_size": size}, or an empty dictionary if `size` is the default of the model.

    The caller hashes the dictionary together with other settings. Earlier versions of this package did not hash the
    batch size. Because the default is left out, the hash is still the same as in these versions.
    """
    return {} if size == default_sample_batch_size(model) else {"sample_batch_size": size}
