"""One file to a diffusers folder and back: what the door `convert` does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from dreambooth import clip_words, files, remote, single
from dreambooth.components import Components
from dreambooth.console import Console
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.layout import Family
from dreambooth.opening import blank_parts, open_parts, read_json
from dreambooth.packaged import asset
from dreambooth.recognise import opened, recognised
from dreambooth.schema_storage import is_remote, is_single

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
    source, config, vae = remote.local(source) or "", remote.local(config), remote.local(vae)
    console = Console()
    if is_single(out):
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
    with _writing(out), files.whole_folder(Path(out), fresh=True) as aside:
        _save(parts, aside)
    noise = ", zero terminal SNR" if found.pure_noise else ""
    console.say(f"{out}: {KNOWN[found.family]}, {found.prediction_type} at {found.resolution} px{noise}, by {found.why}")
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


@contextmanager
def _writing(out: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a class of its own
        raise DoesNotFit(f"{out} could not be written ({error}): free some space, or type out= another place"
                         ) from error


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
    with _writing(out):
        count = single.write(parts, out, dtype, with_vae, facts)
    console.say(f"{out}: {count} tensors, {out.stat().st_size / 2**20:.1f} MiB")
    return out


def _model_in(source: Path) -> tuple[Path, Mapping[str, str]]:
    for folder in (source / "model", source):
        if (folder / "model_index.json").is_file():
            run = source / "run.json"
            return folder, read_json(run)["settings"] if run.is_file() else {}
    raise UserError(f"there is no model in {source}: type in=DIR, a folder of diffusers or a finished run")
