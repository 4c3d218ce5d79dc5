"""Converts single files in model.source and model.vae to diffusers folders below run_root, once per file."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from dreambooth.config.schema import Config
from dreambooth.config.storage import is_single_file
from dreambooth.errors import UserError
from dreambooth.models import families
from dreambooth.models.families.family import Family
from dreambooth.serialization import export_layout, single_file
from dreambooth.serialization.convert import convert
from dreambooth.serialization.detect_format import open_model_file
from dreambooth.serialization.load_parts import read_json
from dreambooth.storage import manifest
from dreambooth.storage.run_inputs import is_main_process
from dreambooth.utils import atomic_files, file_lock, quoting
from dreambooth.utils.assets import resolve_asset

log = logging.getLogger(__name__)

def as_folders(config: Config) -> Config:
    """Return a copy of the config in which folders replace the single files in model.source and model.vae.

    Each file is converted to a diffusers folder, unless this was done before.

    Raises:
        UserError: a file cannot be converted.
    """
    config = deepcopy(config)
    if is_single_file(config.model.source):
        config.model.source = str(_convert_model(config))
    if is_single_file(config.model.vae):
        config.model.vae = str(_convert_vae(config, config.model.vae or ""))
    return config


def _convert_model(config: Config) -> Path:
    path = _check_file("source", config.model.source)
    with _locked_folder(config, path) as target:
        if not _is_converted(target, "model_index.json"):
            if target.exists():
                atomic_files.remove_folder(target)
            command = quoting.command("convert", {"in": str(path), "out": "DIR", "config": "DIR"})
            convert(str(path), str(target), offline=config.model.offline, download_hint="model.offline=false",
                    config_hint=f"{command}, then model.source=DIR")
    return target


def _convert_vae(config: Config, source: str) -> Path:
    """Convert a single file with a VAE to a folder, and return the folder.

    The configuration comes from the base model's own VAE. There is one folder per file and configuration.
    """
    path = _check_file("vae", source)
    family, configuration = _vae_configuration(config, path)
    key = sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:8]
    with _locked_folder(config, path, key) as target:
        if not _is_converted(target, "vae/config.json"):
            with torch.device("meta"):
                vae = family.vae.build(configuration)
            single_file.fill_vae(vae, family, open_model_file(path))
            with manifest.write_folder(target) as aside:
                vae.save_pretrained(aside / "vae")
    return target


def _is_converted(target: Path, main_file: str) -> bool:
    """Return whether `target` contains an undamaged earlier conversion. Log a warning if it is damaged.

    Args:
        main_file: path in `target` of a file that each conversion contains.
    """
    damage = manifest.find_damage(target, contents=is_main_process())  # the other processes compare only the sizes
    if damage is not None:
        log.warning("the converted model in %s is damaged (%s) and is written again", target, damage)
    return damage is None and (target / main_file).is_file()


def _vae_configuration(config: Config, path: Path) -> tuple[Family, dict[str, Any]]:
    """Return the family of the base model, and the configuration for the VAE in the file `path`."""
    folders = [Path(resolve_asset(config.model.source)),
               Path(resolve_asset("package:architectures")) / config.model.name]
    base = next((folder for folder in folders if (folder / "vae/config.json").is_file()), None)
    family = None if base is None else families.of_folder(base)
    if base is None or family is None:
        raise UserError(f"the shape of {path} is not known here: type model.vae=DIR, a folder with its config.json")
    # Keys that begin with an underscore only describe the library that wrote the file.
    configuration = {key: value for key, value in read_json(base / "vae/config.json").items() if key[0] != "_"}
    safe = family.is_half_safe(str(path))
    return family, family.mark_half_safe(configuration, True) if safe else configuration


def _check_file(key: str, source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise UserError(f"there is no file {path}: type model.{key}=FILE, the path of a .safetensors or .ckpt file")
    from dreambooth.models.loading import import_libraries

    import_libraries()
    return path


@contextmanager
def _locked_folder(config: Config, path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield the folder to which a single file is converted, locked against other processes.

    The name of the folder contains a hash of the whole file, because two merged models with the same base model can
    have the same size, the same beginning and the same end.
    """
    stem = re.sub(r"[^A-Za-z0-9_.]+", "-", path.stem)[:60]
    name = "-".join(filter(None, [stem, atomic_files.full_digest(path)[:10], suffix]))
    target = Path(config.run_root).absolute() / export_layout.CONVERTED / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock.hold(target.with_name(f".{name}.lock")):
        yield target
