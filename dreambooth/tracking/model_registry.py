"""Access to MLflow's model registry: registers versions of models, and reads and sets aliases of versions."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.serialization.export_layout import DESCRIPTIONS
from dreambooth.storage import manifest
from dreambooth.tracking.mlflow_client import (
    DEFAULTS,
    REFUSES_USER,
    TIMEOUT_VARIABLE,
    is_refusal,
    remedy,
    set_default_environment,
)
from dreambooth.tracking.mlflow_database import open_client
from dreambooth.tracking.mlflow_model import MODEL_FILE
from dreambooth.utils import permissions
from dreambooth.utils.masking import mask_urls

CHAMPION, CANDIDATE = "champion", "candidate"
FILE_TIMEOUT = "600"  # seconds, as text: timeout for the transfer of one file, because model files may have gigabytes
PROGRESS_VARIABLE = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"


@dataclass(frozen=True)
class Version:
    """One registered version of a model."""

    name: str
    number: int
    run_id: str
    tags: dict[str, str]


class Registry:
    """The model registry of an MLflow server or database.

    Every method raises UserError if the server does not answer or rejects the request.

    Args:
        uri_key: the configuration key that names the server, such as tracking.uri. Error messages suggest to change it.
    """

    def __init__(self, uri: str, uri_key: str = "uri") -> None:
        set_default_environment()
        self._uri, self._uri_key = uri, uri_key
        self._client = self._call(lambda: open_client(uri))

    def get_by_alias(self, name: str, alias: str) -> Version | None:
        """Return the version of the model `name` that has `alias`, or None if no version has this alias."""
        if all(model.name != name for model in self._search_models(name)):
            return None
        model = self._call(lambda: self._client.get_registered_model(name))
        number = model.aliases.get(alias)
        return None if number is None else _to_version(self._call(
            lambda: self._client.get_model_version(name, str(number))))

    def register(self, name: str, run_id: str, folder: Path, tags: dict[str, str],
                 as_mlflow_model: Callable[[], AbstractContextManager[Path]]) -> Version:
        """Copy a model to the artifacts of its run, and register the copy as a new version of the model `name`.

        If the run already has a version with all of `tags`, return the existing version instead. Its files are copied
        again if MLflow no longer has all of them, or if an earlier version of this package has registered the folder
        without the file MLmodel. The name of the artifact folder consists of the values of the tags `holds`, `step` and
        `exported_step`. The model of an extended run therefore does not overwrite the files of an earlier version.

        Args:
            folder: the exported model.
            as_mlflow_model: yields the folder to copy, which contains the files of `folder` and those of an MLflow
                model. It is called only if files are copied.
        """
        existing = [version for version in self._search_versions(name, run_id) if tags.items() <= version.tags.items()]
        if existing and not self._lacking(existing[-1], folder):
            return existing[-1]
        artifact_folder = "-".join([
            tags.get("holds", "model"), *(tags[key] for key in ("step", "exported_step") if key in tags)])
        with as_mlflow_model() as complete, _environment(TIMEOUT_VARIABLE, FILE_TIMEOUT):
            self._call(lambda: self._client.log_artifacts(run_id, str(complete), artifact_folder))
        if all(model.name != name for model in self._search_models(name)):
            self._call(lambda: self._client.create_registered_model(name))
        artifacts = self._call(lambda: self._client.get_run(run_id)).info.artifact_uri.rstrip("/")
        version = existing[-1] if existing else _to_version(self._call(lambda: self._client.create_model_version(
            name, f"{artifacts}/{artifact_folder}", run_id, tags=tags, await_creation_for=0)))
        if lacking := self._lacking(version, folder):
            raise UserError(f"version {version.number} of {name} cannot be loaded from MLflow, which lacks its "
                            f"{lacking}: check where MLflow stores artifacts, then repeat the command")
        return version

    def _lacking(self, version: Version, folder: Path) -> str | None:
        """Return the name of a file of a model that MLflow does not have in its size, or None if it has all files.

        Args:
            folder: the exported model. A user may have changed its DESCRIPTIONS since it was copied to MLflow.
        """
        stored = self._call(lambda: _file_sizes(
            self._client.get_model_version_download_uri(version.name, str(version.number)), self._uri))
        files = {path.relative_to(folder).as_posix(): path.stat().st_size
                 for path in folder.rglob("*") if path.is_file()}
        return next((name for name, size in sorted(files.items())
                     if (name not in stored or stored[name] not in (None, size))
                     and name not in (*DESCRIPTIONS, manifest.NAME)), None if MODEL_FILE in stored else MODEL_FILE)

    def list_versions(self, name: str) -> list[Version]:
        """Return all versions of the model `name`, oldest first. `name` must not contain a quote."""
        found = self._call(lambda: self._client.search_model_versions(f"name='{name}'"))
        return sorted(map(_to_version, found), key=lambda version: version.number)

    def download(self, version: Version, target: Path) -> None:
        """Download the files of a version to the existing folder `target`."""
        from mlflow.artifacts import download_artifacts

        uri = self._call(lambda: self._client.get_model_version_download_uri(version.name, str(version.number)))
        with _environment(TIMEOUT_VARIABLE, FILE_TIMEOUT), _environment(PROGRESS_VARIABLE, "false"):
            folder = Path(self._call(lambda: download_artifacts(artifact_uri=uri, dst_path=str(target),
                                                                tracking_uri=self._uri)))
        if folder.resolve() != target.resolve():  # MLflow has created a folder with the name of the artifact in it
            for path in list(folder.iterdir()):
                path.rename(target / path.name)
            folder.rmdir()

    def set_tag(self, version: Version, key: str, value: str) -> None:
        """Set a tag of a version."""
        self._call(lambda: self._client.set_model_version_tag(version.name, str(version.number), key, value))

    def set_alias(self, version: Version, alias: str) -> None:
        """Set an alias on a version. Another version that has the alias loses the alias, but is not deleted."""
        self._call(lambda: self._client.set_registered_model_alias(version.name, alias, str(version.number)))

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias from the model `name`: the version with this alias loses it, but is not deleted."""
        self._call(lambda: self._client.delete_registered_model_alias(name, alias))

    def _search_models(self, name: str) -> Any:
        if "'" in name:  # MLflow's filter syntax cannot escape a quote
            raise UserError(f"the name of a registered model must not contain a quote: {name!r} does, type another "
                            "name=")
        return self._call(lambda: self._client.search_registered_models(f"name='{name}'"))

    def _search_versions(self, name: str, run_id: str) -> list[Version]:
        found = self._call(lambda: self._client.search_model_versions(f"run_id='{run_id}'"))
        return sorted((_to_version(item) for item in found if item.name == name), key=lambda item: item.number)

    def _call(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except Exception as error:  # an error of MLflow, requests or the database driver
            refusal = permissions.find_refusal(error)
            reason = mask_urls(refusal.describe() if refusal else " ".join(str(error).split())[:300], self._uri)
            server = f"MLflow at {mask_urls(self._uri, self._uri)}"
            if is_refusal(error):
                raise UserError(f"{server} {REFUSES_USER} ({reason}): {remedy(self._uri, error)}") from error
            raise UserError(f"{server} rejects the request or does not answer ({reason}): {remedy(self._uri, error)}, "
                            f"or type {self._uri_key}=ADDRESS of one that answers") from error


def _file_sizes(uri: str, tracking_uri: str) -> dict[str, int | None]:
    """Return the sizes in bytes of all files that MLflow has below the address `uri`, by relative path.

    A size is None if the store of the artifacts does not tell it.
    """
    from mlflow.artifacts import list_artifacts

    sizes: dict[str, int | None] = {}
    for item in list_artifacts(artifact_uri=uri, tracking_uri=tracking_uri):
        name = item.path.rpartition("/")[2]
        if item.is_dir:
            sizes |= {f"{name}/{path}": size for path, size in _file_sizes(f"{uri}/{name}", tracking_uri).items()}
        else:
            sizes[name] = None if item.file_size is None else int(item.file_size)
    return sizes


def _to_version(item: Any) -> Version:
    return Version(item.name, int(item.version), item.run_id, dict(item.tags))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Context manager that sets an environment variable, unless the user has set it."""
    before = os.environ.get(name)
    if before == DEFAULTS.get(name):
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
