"""Addresses of models: downloads registered models (models:/NAME@ALIAS, models:/NAME/VERSION) and S3 folders.

The commands generate, serve and deploy read the addresses that users type with `local_path`.
"""

import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.serialization import export_layout
from dreambooth.storage import run_inputs
from dreambooth.tracking.mlflow_database import database_file, database_uri
from dreambooth.tracking.mlflow_model import MODEL_FILE
from dreambooth.tracking.model_registry import Registry, Version
from dreambooth.utils import atomic_files, file_lock
from dreambooth.utils.console import Console
from dreambooth.utils.masking import mask_urls

PREFIX = "models:/"
CACHE = "registered"  # folder of the downloaded models, in the folder for downloads
TRACKING_URI = "MLFLOW_TRACKING_URI"  # environment variable that MLflow reads too


def is_registered(address: str | None) -> bool:
    """Return whether an address names a model in MLflow's model registry."""
    return address is not None and address.startswith(PREFIX)


def local_path(address: str | None, uri: str | None = None, run_root: str | Path = "runs",
               cache: str | Path | None = None) -> str | None:
    """Return the path of a model on this machine; download it first if the address is models:/... or s3://...

    Any other address, such as a folder or a hub id, is returned unchanged.

    Args:
        uri: MLflow server of models:/ addresses; None: the environment variable MLFLOW_TRACKING_URI, or else
            `run_root`/mlflow.db.
        run_root: folder of the runs.
        cache: folder for downloads; None: `run_root`. Models of MLflow are downloaded to its subfolder CACHE, once per
            version, and those in S3 to its subfolder s3.

    Raises:
        UserError: there is no such version, MLflow does not answer, or the download failed.
    """
    cache = cache or run_root
    if not is_registered(address):
        return run_inputs.download_if_remote(address, f"{cache}/s3")
    name, alias, number = _parse(str(address))
    server = uri or os.environ.get(TRACKING_URI) or database_uri((Path(run_root) / "mlflow.db").resolve())
    if (file := database_file(server)) and not file.exists():
        raise UserError(f"there is no MLflow database {file} that knows {address}: type uri=ADDRESS of the MLflow "
                        "server that has it")
    registry = Registry(server)
    version = _find(registry, name, alias, number)
    if version is None:
        known = ", ".join(str(one.number) for one in registry.list_versions(name)) or "none"
        raise UserError(f"MLflow at {mask_urls(server, server)} has no model {address}: type {PREFIX}NAME@ALIAS or "
                        f"{PREFIX}NAME/VERSION; the versions of {name} are {known}")
    return str(_download(registry, version, server, Path(cache) / CACHE))


def _parse(address: str) -> tuple[str, str | None, int | None]:
    """Return the name and the alias, or the name and the number, of a registered version."""
    found = re.fullmatch(r"models:/+([^/@:']+)(?:@([^/@]+)|/(\d+))", address)
    if not found:
        raise UserError(f"{address} is not the address of a registered model: type {PREFIX}NAME@champion or "
                        f"{PREFIX}NAME/VERSION")
    return found[1], found[2], int(found[3]) if found[3] else None


def _find(registry: Registry, name: str, alias: str | None, number: int | None) -> Version | None:
    if alias is not None:
        return registry.get_by_alias(name, alias)
    return next((version for version in registry.list_versions(name) if version.number == number), None)


def _download(registry: Registry, version: Version, server: str, cache: Path) -> Path:
    """Return the folder with the files of a version; download them unless they are in the cache."""
    mark = sha256(f"{server} {version.run_id}".encode()).hexdigest()[:8]
    target = cache / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', version.name)}-{version.number}-{mark}"
    cache.mkdir(parents=True, exist_ok=True)
    with file_lock.hold(target.with_name(f".{target.name}.lock")):
        if not (target / MODEL_FILE).is_file() or export_layout.find_damage(target, contents=False):
            Console(quiet=not run_inputs.is_main_process()).say(
                f"downloading version {version.number} of {version.name} from MLflow")
            with atomic_files.write_folder(target) as temporary:
                registry.download(version, temporary)
                _describe_plain_model(temporary, version)
    return target


def _describe_plain_model(folder: Path, version: Version) -> None:
    """Write run.json for a version that an earlier version of this package registered, from what is known of it.

    Such a version holds the exported model alone. The settings of its base model are in the tags of the version and in
    the metadata of the adapter's file.
    """
    if (folder / "run.json").is_file():
        return
    settings: dict[str, Any] = {"model.source": version.tags.get("base"),
                                "dataset.instance_prompt": version.tags.get("instance_prompt")}
    if adapter := export_layout.find_adapter(folder):
        from dreambooth.serialization.lora_files import read_base_settings

        settings |= {f"model.{key}": value for key, value in read_base_settings(adapter).items()}
    atomic_files.write_json(folder / "run.json", {
        "run": version.tags.get("run", version.name),
        "settings": {key: value for key, value in settings.items() if value}})
