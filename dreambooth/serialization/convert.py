"""One file to a diffusers folder and back: what the door `convert` does."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from dreambooth.config.storage import is_remote, is_single
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.models.components import Components
from dreambooth.serialization import clip_tokenizer, single_file
from dreambooth.serialization.detect_format import opened, recognised
from dreambooth.serialization.ldm_keys import Family
from dreambooth.serialization.load_parts import blank_parts, open_parts, read_json
from dreambooth.serialization.lora_files import DIFFUSERS as ADAPTER
from dreambooth.storage import run_inputs
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import asset
from dreambooth.utils.console import Console

KNOWN = {Family.sd1: "sd15", Family.sd2: "sd21", Family.sdxl: "sdxl"}  # the architecture that files of a family have
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, None: None}


def convert(source: str, out: str, *, config: str | None = None, vae: str | None = None, dtype: str | None = None,
            with_vae: bool = True, prediction_type: str | None = None, resolution: int | None = None,
            title: str | None = None) -> Path:
    """A file to a folder, or a folder (a run's too) to a file; which way is by the names.

    Raises:
        UserError: neither way, or what is there cannot be converted.
    """
    _check_out(source, out)
    _check_keys(out, {"config": config, "prediction_type": prediction_type, "resolution": resolution},
                {"with_vae": not with_vae, "title": title})
    if vae and not with_vae:
        raise UserError("with_vae=false leaves out what vae names: leave one of them out")
    source, config, vae = run_inputs.local(source) or "", run_inputs.local(config), run_inputs.local(vae)
    console = Console()
    if is_single(out):
        return _to_file(Path(source), Path(out), vae, DTYPES[dtype], with_vae, title, console)
    file = opened(Path(source))
    found = recognised(file, prediction_type, resolution)
    folder = Path(config) if config else Path(asset("package:architectures")) / KNOWN[found.family]
    parts = blank_parts(folder, found)
    if strange := single_file.fill(parts, file, found.family):
        console.say(f"{len(strange)} tensors of {source} are not of this model and were left out: "
                    f"{', '.join(strange[:3])}" + (", ..." if len(strange) > 3 else ""))
    if vae:
        single_file.only_vae(parts.vae, opened(Path(vae)))
    for module in parts.modules if DTYPES[dtype] else ():
        module.to(DTYPES[dtype])
    with _writing(out), atomic_files.whole_folder(Path(out), fresh=True) as aside:
        _save(parts, aside)
    noise = ", zero terminal SNR" if found.pure_noise else ""
    console.say(f"{out}: {KNOWN[found.family]}; {found.prediction_type}{noise}, by {found.why}; "
                f"{found.resolution} px, by {found.sized}")
    return Path(out)


def _check_out(source: str, out: str) -> None:
    """Said before anything is read: nothing that is there is ever replaced."""
    if is_single(source) == is_single(out):
        raise UserError("one of in and out is a file and the other a folder: type in=MODEL.safetensors out=DIR, or "
                        "in=DIR out=MODEL.safetensors")
    if is_remote(out):
        name = "DIR/MODEL.safetensors" if is_single(out) else "DIR"
        raise UserError(f"out={out} is in S3, and this writes to this machine: type out={name}, then python -m "
                        "dreambooth.storage upload DIR s3://BUCKET/PREFIX")
    path = Path(out)
    if is_single(out):
        if path.suffix.lower() != ".safetensors":
            raise UserError(f"{out} would be a pickle, and nothing here writes one: type out=MODEL.safetensors")
        if path.exists():
            raise UserError(f"{out} is there already: type out=MODEL.safetensors, a new file, or remove that one first")
    elif path.exists() and (not path.is_dir() or not path.name or any(path.iterdir())):
        raise UserError(f"{out} holds other things: type out=DIR, a new folder")


def _check_keys(out: str, of_files: Mapping[str, object], of_folders: Mapping[str, object]) -> None:
    """A key that was typed and would do nothing is said."""
    idle, way = (of_files, "a folder becomes a file") if is_single(out) else (of_folders, "a file becomes a folder")
    if typed := [key for key, value in idle.items() if value]:
        raise UserError(f"{' and '.join(typed)} would change nothing where {way}: leave that out")


@contextmanager
def _writing(out: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a class of its own
        raise DoesNotFit(f"{out} could not be written ({error}): free some space, or type out= another place"
                         ) from error


def _save(parts: Components, folder: Path) -> None:
    from dreambooth.serialization.export import whole_pipeline

    whole_pipeline(parts).save_pretrained(folder, safe_serialization=True)
    for name, tokenizer in (("tokenizer", parts.tokenizer), ("tokenizer_2", parts.tokenizer_2)):
        if tokenizer is not None:
            clip_tokenizer.save(tokenizer, folder / name)


def _to_file(source: Path, out: Path, vae: str | None, dtype: torch.dtype | None, with_vae: bool, title: str | None,
             console: Console) -> Path:
    folder, settings = _model_in(source)
    parts = open_parts(folder)
    if vae:
        single_file.only_vae(parts.vae, opened(Path(vae)))
    facts = {"modelspec.title": title or settings.get("name") or source.absolute().name} | _facts(settings)
    with _writing(out):
        count = single_file.write(parts, out, dtype, with_vae, facts)
    console.say(f"{out}: {count} tensors, {out.stat().st_size / 2**20:.1f} MiB")
    return out


def _facts(settings: Mapping[str, str]) -> dict[str, str]:
    """What a run says of its model, whose settings are texts: the prompt of its first subject, and its pixels."""
    several = json.loads(settings.get("dataset.concepts", "[]"))
    prompt = several[0]["instance_prompt"] if several else settings.get("dataset.instance_prompt")
    side = settings.get("model.resolution")
    found = {"modelspec.trigger_phrase": None if prompt == "null" else prompt,
             "modelspec.resolution": f"{side}x{side}" if side else None}
    return {key: value for key, value in found.items() if value}


def _model_in(source: Path) -> tuple[Path, Mapping[str, str]]:
    for folder in (source / "model", source):
        if (folder / "model_index.json").is_file():
            run = source / "run.json"
            return folder, read_json(run)["settings"] if run.is_file() else {}
        if (folder / ADAPTER).is_file():
            raise UserError(f"{source} holds an adapter and no model of its own: repeat the command of its run with "
                            "method.merge=true, which writes one and trains nothing")
    raise UserError(f"there is no model in {source}: type in=DIR, a folder of diffusers or a finished run")
