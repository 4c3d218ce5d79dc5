"""Converts a single file to a diffusers folder, or such a folder to a file, for `python -m dreambooth.convert`."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from dreambooth.config.storage import is_remote, is_single_file
from dreambooth.errors import UserError
from dreambooth.models import families, hub
from dreambooth.models.components import Components
from dreambooth.models.families.family import Family
from dreambooth.serialization import embedding_files, export_layout, single_file
from dreambooth.serialization.detect_format import DetectedModel, detect, open_model_file
from dreambooth.serialization.export import whole_pipeline
from dreambooth.serialization.export_layout import EMBEDDINGS
from dreambooth.serialization.load_parts import CONFIG_HINT, build_parts, load_other_parts, load_parts
from dreambooth.serialization.merge_adapter import find_lone_adapter, load_merged
from dreambooth.storage import manifest, run_inputs
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.console import Console
from dreambooth.utils.plurals import counted

WRITABLE_OUT = "type out= and a path in a folder that you can write to"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, None: None}


def convert(source: str, out: str, *, config: str | None = None, vae: str | None = None, dtype: str | None = None,
            with_vae: bool = True, prediction_type: str | None = None, resolution: int | None = None,
            title: str | None = None, offline: bool = True, config_hint: str = CONFIG_HINT,
            download_hint: str | None = None) -> Path:
    """Convert a single file to a diffusers folder, or a diffusers or run folder to a single file.

    The adapter of a run is merged into its base model, to a folder or to a single file.

    A name that ends in .safetensors or .ckpt means a single file. All other names mean folders.
    Args:
        source: a single file or a folder, on this machine or in S3.
        out: the new folder or file.
        config: a diffusers folder with the architecture of the source file; None: the family's published architecture.
            If the source file contains the denoiser alone, all other parts come from this folder. It may then be a hub
            id; None: the family's published model.
        vae: a single file with a VAE that replaces the model's own.
        dtype: precision of the written weights, fp16, bf16 or fp32; None: the precision of each weight in `source`.
        with_vae: whether the written file contains the VAE; only if `out` is a file.
        prediction_type, resolution: properties of the model in a source file; None: as detected in the file.
        title: title in the metadata of the written file; only if `out` is a file.
        offline: whether the family's published model is not downloaded.
        config_hint: what error messages tell the user to type in order to name another `config`.
        download_hint: what they tell the user to type in order to download the family's published model; None: config=
            and its hub id.

    Returns:
        `out`.

    Raises:
        UserError: `source` and `out` are both files or both folders, `out` has content already, an argument has no
            effect in this direction, or `source` cannot be converted.
        DoesNotFit: the disk is full.
    """
    adapter = None if is_remote(source) else find_lone_adapter(Path(source))
    if adapter and (typed := [key for key, value in {"config": config, "prediction_type": prediction_type,
                                                     "resolution": resolution, "vae": vae}.items() if value]):
        raise UserError(f"{' and '.join(typed)} would change nothing where an adapter is merged into its base model: "
                        "leave that out")
    _check_out(source, out, adapter is not None)
    _check_unused(out, {"config": config, "prediction_type": prediction_type, "resolution": resolution},
                  {"with_vae": not with_vae, "title": title})
    if vae and not with_vae:
        raise UserError("with_vae=false leaves out what vae names: leave one of them out")
    local_source = Path(run_inputs.download_if_remote(source) or "")
    console = Console()
    if adapter and not is_single_file(out):
        parts = load_merged(adapter, DTYPES[dtype], whole=True)
        with _reporting_failure(out), manifest.write_folder(Path(out), fresh=True) as aside:
            _save(parts, aside)
        console.say(f"{out}: {parts.family.title}, with the adapter {adapter} merged into it")
        return Path(out)
    if is_single_file(out):
        return _to_file(local_source, Path(out), vae, DTYPES[dtype], with_vae, title, console)
    file = open_model_file(local_source)
    detected = detect(file, prediction_type, resolution)
    family, architecture = detected.family, detected.family.architecture
    whole = family.single_file.whole
    if not whole and (prediction_type or resolution or vae):
        raise UserError(f"vae, prediction_type and resolution would change nothing for {family.title}: leave them out")
    config, vae = run_inputs.download_if_remote(config), run_inputs.download_if_remote(vae)
    folder = Path(config or Path(resolve_asset("package:architectures")) / architecture) if whole else (
        _other_parts(config, detected, local_source, offline, config_hint, download_hint))
    _check_family(str(folder), _family_of(folder), family, local_source, config_hint)
    parts = build_parts(folder, detected, config_hint)
    if unknown := single_file.fill(parts, file, config_hint):
        console.say(f"{counted(len(unknown), 'tensor')} of {local_source}, not of this model, left out: "
                    f"{', '.join(unknown[:3])}" + (", ..." if len(unknown) > 3 else ""))
    if not whole:
        parts = load_other_parts(parts, folder, config_hint)
    if vae:
        single_file.fill_vae(parts.vae, parts.family, open_model_file(Path(vae)))
    for name, module in parts.modules_by_name.items():
        if DTYPES[dtype]:
            module.to(DTYPES[dtype])
        single_file.check_finite({f"{name}.{key}": weight for key, weight in module.state_dict().items()})
    with _reporting_failure(out), manifest.write_folder(Path(out), fresh=True) as aside:
        _save(parts, aside)
    if not whole:
        console.say(f"{out}: {architecture}; the transformer of {local_source}, all other parts of {folder}")
        return Path(out)
    noise = ", zero terminal SNR" if detected.is_rescaled else ""
    console.say(f"{out}: {architecture}; {detected.prediction_type}{noise}, by {detected.prediction_reason}; "
                f"{detected.resolution} px, by {detected.resolution_reason}")
    return Path(out)


def _family_of(folder: Path) -> Family | None:
    try:
        return families.of_folder(folder)
    except (OSError, ValueError):
        return None  # build_parts reports what is wrong with the folder


def _check_family(origin: str, found: Family | None, family: Family, source: Path, config_hint: str) -> None:
    """Check that the model whose parts complete a single file is of the file's family.

    Args:
        origin: folder or hub id of that model.
        found: its family; None: unknown.
        family: the family of the file `source`.

    Raises:
        UserError: it is of another family.
    """
    if found not in (None, family):
        raise UserError(f"{origin} is a model of {found.title}, and {source} of {family.title}: type {config_hint}, "
                        f"a diffusers folder of {family.title}")


def _other_parts(config: str | None, detected: DetectedModel, source: Path, offline: bool, config_hint: str,
                 download_hint: str | None) -> Path:
    """Return the local diffusers folder with the parts that a file with the denoiser alone does not contain.

    Args:
        config: a diffusers folder or hub id that the user typed; None: the family's published model.
        config_hint, download_hint: as in `convert`.

    Raises:
        UserError: the hub id is not on this machine, and could not be downloaded or must not be; or it is of another
            family.
    """
    family = detected.family
    origin = config or family.hub_ids[0]
    if hub.is_local(origin):
        return Path(origin)
    offline = offline and config is None
    try:
        local = hub.local_files_only(origin, offline)
        _check_family(origin, families.of_source(origin, local_files_only=local)[0], family, source, config_hint)
        folders = [*(part.name for part in family.parts()), *family.tokenizers, "scheduler"]
        weights = [f"{part.name}/*.safetensors*" for part in (family.vae, *family.encoders)]
        texts = [f"{name}/{pattern}" for name in folders for pattern in ("*.json", "*.txt", "*.model", "*.jinja")]
        return hub.download(origin, [*texts, *weights, "model_index.json"], local)
    except (OSError, ValueError) as error:
        hint = f", or {download_hint or f'config={origin}'} to download them" if offline else ""
        raise UserError(f"{source} contains the transformer of {family.title} alone, and the VAE and the text encoders "
                        f"of {origin} could not be loaded ({hub.failure_reason(error, origin, offline)}): type "
                        f"{config_hint}, a diffusers folder of the model{hint}") from error


def _check_out(source: str, out: str, is_adapter: bool) -> None:
    """Check the names of `source` and `out` before anything is read.

    Raises:
        UserError: `source` and `out` are both files or both folders; or `out` is in S3, is not writable, or has content
            already, because nothing is ever replaced.
    """
    if is_single_file(source) == is_single_file(out) and not is_adapter:
        raise UserError("one of in and out is a file and the other a folder: type in=MODEL.safetensors out=DIR, or "
                        "in=DIR out=MODEL.safetensors")
    if is_remote(out):
        name = "DIR/MODEL.safetensors" if is_single_file(out) else "DIR"
        raise UserError(f"out={out} is in S3, and this writes to this machine: type out={name}, then python -m "
                        "dreambooth.storage upload DIR s3://BUCKET/PREFIX")
    path = Path(out)
    if is_single_file(out):
        if path.suffix.lower() != ".safetensors":
            raise UserError(f"{out} would be a pickle, and nothing here writes one: type out=MODEL.safetensors")
        if path.exists():
            raise UserError(f"{out} is there already: type out=MODEL.safetensors, a new file, or remove that one first")
    elif path.exists() and (not path.is_dir() or not path.name or any(path.iterdir())):
        raise UserError(f"{out} holds other things: type out=DIR, a new folder")
    atomic_files.check_writable(path.absolute().parent, WRITABLE_OUT)


def _check_unused(out: str, of_files: Mapping[str, object], of_folders: Mapping[str, object]) -> None:
    """Raise an error if the user set an option that has no effect in this direction of conversion.

    Args:
        of_files: names and values of the options that have an effect only if a file is converted.
        of_folders: names and values of the options that have an effect only if a folder is converted.

    Raises:
        UserError: an option without effect is set.
    """
    unused, direction = (of_files, "a folder becomes a file") if is_single_file(out) else (
        of_folders, "a file becomes a folder")
    if typed := [key for key, value in unused.items() if value]:
        raise UserError(f"{' and '.join(typed)} would change nothing where {direction}: leave that out")


@contextmanager
def _reporting_failure(out: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises SafetensorError if the disk is full
        raise atomic_files.write_failure(str(out), error, WRITABLE_OUT) from error


def _save(parts: Components, folder: Path) -> None:
    whole_pipeline(parts).save_pretrained(folder, safe_serialization=True)
    for name, tokenizer in parts.tokenizers_by_name.items():
        parts.family.save_tokenizer(tokenizer, folder / name)


def _to_file(source: Path, out: Path, vae: str | None, dtype: torch.dtype | None, with_vae: bool, title: str | None,
             console: Console) -> Path:
    if adapter := find_lone_adapter(source):
        parts = load_merged(adapter, dtype, whole=False)
        settings: Mapping[str, str] = export_layout.read_settings(source)
        if not with_vae and not parts.family.single_file.whole:
            raise UserError(f"a single file of {parts.family.title} contains the transformer alone: leave with_vae out")
        console.say(f"the adapter {adapter} is merged into its base model")
    else:
        folder, settings = _find_model(source)
        if (vae or not with_vae) and (family := _family_of(folder)) and not family.single_file.whole:
            raise UserError(f"a single file of {family.title} contains the transformer alone: leave vae and with_vae "
                            "out")
        vae = run_inputs.download_if_remote(vae)
        parts = load_parts(folder)
    words = embedding_files.split_off(parts)
    for path in (out.parent / EMBEDDINGS / f"{word}.safetensors" for word in words):
        if path.exists():
            raise UserError(f"{path} is there already: type out=DIR/{out.name} with a new folder, or remove that first")
    if vae:
        single_file.fill_vae(parts.vae, parts.family, open_model_file(Path(vae)))
    name = title or settings.get("name") or source.absolute().name
    with _reporting_failure(out):
        count = single_file.write(parts, out, dtype, with_vae, {"modelspec.title": name} | _run_metadata(settings))
        if words:
            embedding_files.write(out.parent, words, parts.family, {"modelspec.title": name})
    console.say(f"{out}: {count} tensors, {out.stat().st_size / 2**20:.1f} MiB")
    if words:
        console.say(f"{out.parent / EMBEDDINGS}: the embeddings of {', '.join(words)}, which the file cannot contain")
    return out


def _run_metadata(settings: Mapping[str, str]) -> dict[str, str]:
    """Return ModelSpec metadata from the settings of a run: the prompt of its first subject, and the resolution."""
    concepts = json.loads(settings.get("dataset.concepts", "[]"))
    prompt = concepts[0]["instance_prompt"] if concepts else settings.get("dataset.instance_prompt")
    side = settings.get("model.resolution")
    metadata = {"modelspec.trigger_phrase": None if prompt == "null" else prompt,
                "modelspec.resolution": f"{side}x{side}" if side else None}
    return {key: value for key, value in metadata.items() if value}


def _find_model(source: Path) -> tuple[Path, Mapping[str, str]]:
    """Return the diffusers folder in `source`, and the settings of its run ({} if `source` is not a run folder)."""
    for folder in (source / "model", source):
        if (folder / "model_index.json").is_file():
            export_layout.check_intact(folder)
            return folder, export_layout.read_settings(source)
    raise UserError(f"there is no model in {source}: type in=DIR, a folder of diffusers or a finished run")
