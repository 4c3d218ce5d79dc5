"""Models and VAEs of a run that are one file each: turned into folders below run_root, once."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from dreambooth.config.schema import Config
from dreambooth.config.storage import is_single
from dreambooth.errors import UserError
from dreambooth.models.components import says_fixed
from dreambooth.serialization import single_file
from dreambooth.serialization.convert import convert
from dreambooth.serialization.detect_format import opened
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import asset


def as_folders(config: Config) -> Config:
    """The config with folders in place of model.source and model.vae that are one file each; a file is converted once.

    Raises:
        UserError: a file cannot be converted.
    """
    config = deepcopy(config)
    if is_single(config.model.source):
        config.model.source = str(_model(config))
    if is_single(config.model.vae):
        config.model.vae = str(_vae(config, config.model.vae or ""))
    return config


def _model(config: Config) -> Path:
    path = _file("source", config.model.source)
    with _place(config, path) as target:
        if not (target / "model_index.json").is_file():
            if target.exists():
                atomic_files.remove_folder(target)  # half of one
            try:
                convert(str(path), str(target))
            except UserError as error:
                door = f"python -m dreambooth.convert in={path} out=DIR config=DIR, then model.source=DIR"
                raise UserError(str(error).replace("type config=DIR", f"type {door}")) from error
    return target


def _vae(config: Config, source: str) -> Path:
    """A VAE file takes the shape and facts of the base's own VAE: beside another base it is another folder."""
    path = _file("vae", source)
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    facts = _facts(config, path)
    key = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    with _place(config, path, key) as target:
        if not (target / "vae/config.json").is_file():
            with torch.device("meta"):
                vae = AutoencoderKL.from_config(facts)
            single_file.only_vae(vae, opened(path))
            with atomic_files.whole_folder(target) as aside:
                vae.save_pretrained(aside / "vae")
    return target


def _facts(config: Config, path: Path) -> dict[str, Any]:
    """The configuration of the VAE in a file."""
    places = [Path(asset(config.model.source)), Path(asset("package:architectures")) / config.model.name]
    place = next((found for place in places if (found := place / "vae/config.json").is_file()), None)
    if place is None:
        raise UserError(f"the shape of {path} is not known here: type model.vae=DIR, a folder with its config.json")
    known = json.loads(place.read_text(encoding="utf-8"))
    facts = {key: value for key, value in known.items() if not key.startswith("_")}  # not who has written it
    return facts | ({"force_upcast": False} if says_fixed(path.stem) else {})


def _file(key: str, source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise UserError(f"there is no file {path}: type model.{key}=FILE, the path of a .safetensors or .ckpt file")
    from dreambooth.models.loading import import_libraries

    import_libraries()
    return path


@contextmanager
def _place(config: Config, path: Path, more: str = "") -> Iterator[Path]:
    """The folder that a file is converted to, held for as long as it may be made.

    Its name tells the whole content: two merges of one base can be of one size and alike at both ends.
    """
    stem = re.sub(r"[^A-Za-z0-9_.]+", "-", path.stem)[:60]
    name = "-".join(filter(None, [stem, atomic_files.whole_digest(path)[:10], more]))
    target = Path(config.run_root).absolute() / "converted" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{name}.lock")):
        yield target
