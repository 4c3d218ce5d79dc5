"""Finds the model to deploy, and uploads what SageMaker will copy to the instance.

SageMaker is given folders in S3 (ModelDataSource with S3Prefix), not an archive model.tar.gz. Nothing is packed here or
unpacked on the instance, every file is verified when it is uploaded, and the output of a SageMaker training job or the
copy of a run in S3 is deployed where it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth.config.generate import Generate
from dreambooth.config.storage import is_remote, is_single_file
from dreambooth.deployment.endpoint_requests import Artifact, default_name
from dreambooth.deployment.options import Deploy
from dreambooth.errors import UserError
from dreambooth.inference.model_sources import Source, find_source
from dreambooth.models import hub
from dreambooth.serialization.export_layout import ADAPTER, INDEX, OLD_ADAPTER
from dreambooth.storage import folders, manifest
from dreambooth.storage.manifest import Entries
from dreambooth.tracking.registered_models import is_registered, local_path
from dreambooth.utils.assets import ASSET_SCHEME, resolve_asset
from dreambooth.utils.console import Console
from dreambooth.utils.quoting import shell_word

RUN_FILES = ("run.json", "result.json")  # uploaded with the folder model/ of a run; the server reads run.json


@dataclass(frozen=True)
class Upload:
    """A local folder that has to be in S3 before it can be deployed."""

    folder: Path
    uri: str
    entries: Entries

    def run(self, console: Console) -> None:
        """Send the files that S3 does not have, and verify all.

        Raises:
            UserError: the address, which contains a hash of the content, holds other files.
        """
        found = folders.upload_with_fallback(self.folder, self.uri, self.entries, console, folders.PARALLEL)
        if found != self.uri:
            raise UserError(f"{self.uri} holds other files than {self.folder}: type another s3=s3://BUCKET/FOLDER")


@dataclass(frozen=True)
class DeployedModel:
    """A model that was found, where it will be in S3, and what has to be uploaded for that."""

    artifact: Artifact
    uploads: tuple[Upload, ...] = ()
    source: Source | None = None  # the model, or one of the same architecture, for the planner; None: unknown
    adapter_bytes: int = 0  # of an adapter that is not on this machine
    other_adapters: tuple[int, ...] = ()  # bytes of the adapters that requests may name, the largest first


def find_model(options: Deploy) -> DeployedModel:
    """Find the model of the option `run`: a run folder, a model folder, an S3 address, or a registered model.

    Nothing is uploaded.

    Raises:
        UserError: there is no model, it is damaged, or the endpoint could not read a part of it.
    """
    run = options.run
    if not run:
        raise UserError("the model is missing: type run=runs/NAME, run=s3://BUCKET/FOLDER or run=models:/NAME@champion")
    if options.base and is_single_file(options.base):
        raise UserError(f"the base model {options.base} is a single file: type base=DIR, a diffusers folder that "
                        "python -m dreambooth.convert writes")
    local = str(local_path(run, options.uri)) if is_registered(run) else run
    model = _find_in_s3(options, run) if is_remote(local) else _find_local(options, local)
    artifact = replace(model.artifact, adapters=options.adapters, source=run)
    if not options.adapters:
        return replace(model, artifact=artifact)
    sizes = adapter_sizes(folders.list_sizes(_require_folder(options.adapters, "adapters")))
    return replace(model, artifact=artifact, other_adapters=sizes)


def adapter_sizes(sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the bytes of each adapter that a server finds in a folder, the largest first.

    Args:
        sizes: size in bytes of each file in the folder and in its subfolders, by relative path.
    """
    found: dict[str, int] = {}
    for path, size in sizes.items():
        name, _, rest = path.partition("/")
        is_adapter = rest.removeprefix("model/") in (ADAPTER, OLD_ADAPTER) if rest else name.endswith(".safetensors")
        if is_adapter and not name.startswith("."):
            found[name] = max(size, found.get(name, 0))
    return tuple(sorted(found.values(), reverse=True))


def _find_local(options: Deploy, run: str) -> DeployedModel:
    source = find_source(Generate(run=run, base=options.base))
    folder = Path(run)
    has_run = (folder / "run.json").is_file() and (folder / "model").is_dir()
    entries = manifest.hash_folder(folder, only=("model", *RUN_FILES) if has_run else ())
    name = default_name(options.run or run)
    s3 = _require_s3(options, "the model")
    upload = Upload(folder, f"{s3}/models/{name}-{manifest.digest(entries)}", entries)
    if source.adapter is None:
        return DeployedModel(Artifact(upload.uri), (upload,), source)
    if source.vae and Path(source.vae).exists() and not str(source.setting("model.vae")).startswith(ASSET_SCHEME):
        raise UserError(f"this adapter was trained with model.vae={source.setting('model.vae')}, which an endpoint "
                        "cannot read: repeat the command of its run with method.merge=true, which exports one model")
    if Path(source.model).is_relative_to(folder):  # the base model travels with a registered adapter
        return DeployedModel(Artifact(upload.uri), (upload,), source)
    typed = options.base or source.setting("model.source") or ""
    if hub.is_local(source.model) and not is_remote(typed) and not Path(source.model).exists():
        raise _missing_base(options, run, typed)
    base, hub_base, uploads = _find_base(options, typed, source.model, s3)
    return DeployedModel(Artifact(upload.uri, base, hub_base), (upload, *uploads), source)


def _find_base(options: Deploy, typed: str, resolved: str,
               s3: str) -> tuple[str | None, str | None, tuple[Upload, ...]]:
    """Return where the endpoint finds the base model of an adapter: in S3, or by the hub id; and what to upload.

    If the run's own settings lead the server to the base model, both addresses are None.
    """
    if is_remote(typed):
        return _require_folder(typed, "base"), None, ()
    if typed.startswith(ASSET_SCHEME):  # a file of this package, which the image contains too
        return None, typed if options.base else None, ()
    if not Path(resolved).exists():
        return None, typed if options.base else None, ()
    folder = Path(resolved)
    entries = manifest.hash_folder(folder)
    uri = f"{s3}/models/{default_name(folder.absolute().name)}-{manifest.digest(entries)}"
    return uri, None, (Upload(folder, uri, entries),)


def _missing_base(options: Deploy, run: str, base: str) -> UserError:
    what = f"the base model {base}" if options.base else f"the adapter in {run} was trained on {base}, which"
    return UserError(f"{what} is not on this machine: type base=s3://BUCKET/FOLDER or base=HUB_ID")


def _find_in_s3(options: Deploy, run: str) -> DeployedModel:
    uri = _require_folder(run, "run").rstrip("/")
    sizes = folders.list_sizes(uri)
    names = sizes.keys()
    is_adapter = not names & {INDEX, f"model/{INDEX}"}
    if is_adapter and not names & {f"{folder}{file}" for folder in ("", "model/") for file in (ADAPTER, OLD_ADAPTER)}:
        raise UserError(f"{uri} holds neither {INDEX} nor {ADAPTER}: type run=s3://BUCKET/FOLDER, the result of a run")
    if not names & {manifest.NAME, f"model/{manifest.NAME}"}:
        raise UserError(f"{uri} has no {manifest.NAME}, so it may be half uploaded: type python -m dreambooth.storage "
                        f"upload FOLDER {shell_word(uri)}")
    try:
        settings = folders.read_json(f"{uri}/run.json")["settings"] if "run.json" in names else {}
    except (ValueError, KeyError, TypeError):
        settings = {}
    base_of_run = str(settings.get("model.source") or "")
    source = Source(Path(), resolve_asset(base_of_run), None, settings) if base_of_run else None
    if not is_adapter:
        return DeployedModel(Artifact(uri), (), source)
    typed = options.base or base_of_run
    if not typed:
        raise UserError(f"{uri} holds an adapter and does not say of which model: type base=s3://BUCKET/FOLDER or "
                        "base=HUB_ID")
    resolved = resolve_asset(typed)
    is_local = not is_remote(typed) and not typed.startswith(ASSET_SCHEME) and hub.is_local(resolved)
    if is_local and not Path(resolved).exists():
        raise _missing_base(options, uri, typed)
    s3 = _require_s3(options, "the base model") if is_local else ""
    base, hub_base, uploads = _find_base(options, typed, resolved, s3)
    if uploads:  # the planner reads the architecture from the files
        source = Source(Path(), resolved, None, settings, base_typed=options.base is not None)
    size = sum(size for name, size in sizes.items() if name.removeprefix("model/") in (ADAPTER, OLD_ADAPTER))
    return DeployedModel(Artifact(uri, base, hub_base), uploads, source, size)


def _require_folder(uri: str, key: str) -> str:
    content = folders.inspect(uri)
    if content is None or not content.is_folder:
        raise UserError(f"there is no folder {uri}: type {key}=s3://BUCKET/FOLDER")
    return uri


def _require_s3(options: Deploy, what: str) -> str:
    if not options.s3:
        raise UserError(f"{what} has to be uploaded: type s3=s3://BUCKET/FOLDER, or set DREAMBOOTH_S3")
    return options.s3.rstrip("/")
