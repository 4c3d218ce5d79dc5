"""One file to a diffusers folder and back: what the door `convert` does, and what a run does with model.source=FILE."""

import json
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from dreambooth import clip_words, files, single
from dreambooth.components import Components
from dreambooth.console import Console
from dreambooth.errors import UserError
from dreambooth.layout import Family
from dreambooth.packaged import asset
from dreambooth.recognise import Found, opened, recognised
from dreambooth.schema import Config
from dreambooth.schema_storage import is_single

KNOWN = {Family.sd1: "sd15", Family.sd2: "sd21", Family.sdxl: "sdxl"}  # the architecture that files of a family have
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, None: None}


def convert(source: str, out: str, *, config: str | None = None, vae: str | None = None, dtype: str | None = None,
            with_vae: bool = True, prediction_type: str | None = None, resolution: int | None = None,
            title: str | None = None) -> Path:
    """A file to a folder, or a folder (a run's too) to a file; which way is by the names.

    Raises:
        UserError: neither way, or what is there cannot be converted.
    """
    if is_single(source) == is_single(out):
        raise UserError("one of in and out is a file and the other a folder: type in=MODEL.safetensors out=DIR, or "
                        "in=DIR out=MODEL.safetensors")
    console = Console()
    if is_single(out):
        if Path(out).suffix.lower() != ".safetensors":
            raise UserError(f"{out} would be a pickle, and nothing here writes one: type out=MODEL.safetensors")
        return _to_file(Path(source), Path(out), vae, DTYPES[dtype], with_vae, title, console)
    file = opened(Path(source))
    found = recognised(file)
    if prediction_type:
        found = replace(found, prediction_type=prediction_type, why="what you typed")
    found = replace(found, resolution=resolution or found.resolution)
    folder = Path(config) if config else Path(asset("package:architectures")) / KNOWN[found.family]
    parts = blank_parts(folder, found)
    if strange := single.fill(parts, file, found.family):
        console.say(f"{len(strange)} tensors of {source} are not of this model and were left out: "
                    f"{', '.join(strange[:3])}" + (", ..." if len(strange) > 3 else ""))
    if vae:
        single.only_vae(parts.vae, opened(Path(vae)))
    for module in parts.modules if DTYPES[dtype] else ():
        module.to(DTYPES[dtype])
    with files.whole_folder(Path(out)) as aside:
        _save(parts, aside)
    console.say(f"{out}: {KNOWN[found.family]}, {found.prediction_type} at {found.resolution} px, by {found.why}")
    return Path(out)


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


def blank_parts(folder: Path, found: Found | None) -> Components:
    """Parts without memory, built from the configurations of a folder and told what was found in a file.

    Raises:
        UserError: the folder lacks one.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    try:
        vae, unet = (_json(folder / part / "config.json") for part in ("vae", "unet"))
        schedule = _json(folder / "scheduler/scheduler_config.json")
        pad = "!" if found and found.family is Family.sd2 else clip_words.END
        two = found.family is Family.sdxl if found else (folder / "text_encoder_2").is_dir()
        if found:
            unet["sample_size"] = found.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
            schedule = _schedule(schedule, found)
        with torch.device("meta"):
            parts = Components(
                unet=UNet2DConditionModel.from_config(unet), vae=AutoencoderKL.from_config(vae),
                text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")),
                tokenizer=_tokenizer(folder, "tokenizer", pad),
                scheduler_config=schedule)
            if two:
                parts.text_encoder_2 = CLIPTextModelWithProjection(
                    CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2"))
                parts.tokenizer_2 = _tokenizer(folder, "tokenizer_2", "!")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no diffusers folder of this family ({str(error).splitlines()[0][:120]}): type "
                        f"another {'config' if found else 'in'}=DIR") from error
    return parts


def _schedule(config: dict[str, Any], found: Found) -> dict[str, Any]:
    config = config | {"prediction_type": found.prediction_type}
    if found.zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _tokenizer(folder: Path, name: str, pad: str) -> Any:
    if not (folder / name).is_dir():
        return clip_words.tokenizer(pad)
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, subfolder=name)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _save(parts: Components, folder: Path) -> None:
    from dreambooth.export import whole_pipeline

    whole_pipeline(parts).save_pretrained(folder, safe_serialization=True)
    for name, tokenizer in (("tokenizer", parts.tokenizer), ("tokenizer_2", parts.tokenizer_2)):
        if tokenizer is not None:
            clip_words.save(tokenizer, folder / name)


def _to_file(source: Path, out: Path, vae: str | None, dtype: torch.dtype | None, with_vae: bool, title: str | None,
             console: Console) -> Path:
    folder, settings = _model_in(source)
    parts = open_parts(folder)
    if vae:
        single.only_vae(parts.vae, opened(Path(vae)))
    trigger = settings.get("dataset.instance_prompt")
    facts = {"modelspec.title": title or settings.get("name") or source.name}
    facts |= {"modelspec.trigger_phrase": trigger} if trigger else {}
    count = single.write(parts, out, dtype, with_vae, facts)
    console.say(f"{out}: {count} tensors, {out.stat().st_size / 2**20:.1f} MiB")
    return out


def _model_in(source: Path) -> tuple[Path, Mapping[str, str]]:
    for folder in (source / "model", source):
        if (folder / "model_index.json").is_file():
            run = source / "run.json"
            return folder, _json(run)["settings"] if run.is_file() else {}
    raise UserError(f"there is no model in {source}: type in=DIR, a folder of diffusers or a finished run")


OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of a VAE's attention, once


def open_parts(folder: Path) -> Components:
    """The parts of a local diffusers folder, each weight in the precision in which it is kept.

    Raises:
        UserError: it lacks one.
    """
    parts = blank_parts(folder, None)
    for name, module in single.modules(parts):
        paths = sorted((folder / name).glob("*.safetensors"))
        plain = [path for path in paths if ".fp16." not in path.name] or paths
        known = module.state_dict().keys()
        state: dict[str, Tensor] = {}
        for path in plain:
            for key, value in load_file(path).items():
                if not key.endswith("position_ids"):
                    state[_modern(key, known)] = value
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"{folder / name} does not hold the .safetensors weights of its config.json "
                            f"({str(error).splitlines()[-1].strip()[:120]}): type another in=DIR") from error
    return parts


def _modern(key: str, known: Collection[str]) -> str:
    """A weight's name as libraries call it now."""
    before, _, end = key.rpartition(".")
    *outer, last = before.split(".")
    renamed = ".".join([*outer, OLD.get(last, last), end])
    for name in (key, key.removeprefix("text_model."), f"text_model.{key}", renamed):
        if name in known:
            return name
    return key
