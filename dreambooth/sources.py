"""Models and VAEs of a run that are one file each: turned into folders below run_root, once."""

import re
from copy import deepcopy
from pathlib import Path

import torch
from filelock import FileLock

from dreambooth import files, single
from dreambooth.converting import convert
from dreambooth.errors import UserError
from dreambooth.packaged import asset
from dreambooth.recognise import opened
from dreambooth.schema import Config
from dreambooth.schema_storage import is_single


def as_folders(config: Config) -> Config:
    """The config with folders in place of model.source and model.vae that are one file each; a file is converted once.

    Raises:
        UserError: a file cannot be converted.
    """
    model, config = config.model, deepcopy(config)
    if is_single(model.source):
        config.model.source = str(_once(config, model.source, None))
    if is_single(model.vae):
        config.model.vae = str(_once(config, model.vae or "", config.model.source))
    return config


def _once(config: Config, source: str, beside: str | None) -> Path:
    """The folder of a model file, or (`beside` is the base) of a VAE file."""
    path = Path(source)
    if not path.is_file():
        raise UserError(f"there is no file {path}: type model.{'vae' if beside else 'source'}=FILE, the path of a "
                        ".safetensors or .ckpt file")
    from dreambooth.model import import_libraries

    import_libraries()
    name = f"{re.sub(r'[^A-Za-z0-9_.]+', '-', path.stem)[:60]}-{files.ends_digest([path], path.parent)[:10]}"
    target = Path(config.run_root).absolute() / "converted" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{name}.lock")):
        if beside is None and not (target / "model_index.json").is_file():
            if target.exists():
                files.remove_folder(target)  # half of one
            try:
                convert(source, str(target))
            except UserError as error:
                door = f"python -m dreambooth.convert in={source} out=DIR config=DIR, then model.source=DIR"
                raise UserError(str(error).replace("type config=DIR", f"type {door}")) from error
        elif beside is not None and not (target / "vae/config.json").is_file():
            _only_vae(path, target, beside, config.model.name)
    return target


def _only_vae(path: Path, target: Path, beside: str, name: str) -> None:
    """A VAE file takes the shape and facts of the base's own VAE."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    places = [Path(beside), Path(asset("package:architectures")) / name]
    place = next((place for place in places if (place / "vae/config.json").is_file()), None)
    if place is None:
        raise UserError(f"the shape of {path} is not known here: type model.vae=DIR, a folder with its config.json")
    facts = dict(AutoencoderKL.load_config(place, subfolder="vae"))
    if "fp16" in path.stem:
        facts["force_upcast"] = False  # SDXL's fix is known by its name alone
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(facts)
    single.only_vae(vae, opened(path))
    with files.whole_folder(target) as aside:
        vae.save_pretrained(aside / "vae")
