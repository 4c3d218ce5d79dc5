"""MLflow's model registry: versions of a model, and the aliases `champion` and `candidate`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.tracking.mlflow_auth import LOGIN, REFUSES, refuses
from dreambooth.tracking.mlflow_shipper import ENVIRONMENT
from dreambooth.utils.provenance import clean

CHAMPION, CANDIDATE = "champion", "candidate"
UPLOAD = "600"  # seconds that a server has to store one file of a model
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"


@dataclass(frozen=True)
class Version:
    """A registered version of a model."""

    name: str
    number: int
    run_id: str
    tags: dict[str, str]


class Registry:
    """The registry at a tracking server or database.

    Every method raises UserError when it does not answer or does not take what it is given.
    """

    def __init__(self, uri: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._uri, self._mlflow = uri, self._asked(lambda: _client(uri))

    def holder(self, name: str, alias: str) -> Version | None:
        """The version that has an alias."""
        if all(model.name != name for model in self._models(name)):
            return None
        model = self._asked(lambda: self._mlflow.get_registered_model(name))
        number = model.aliases.get(alias)
        return None if number is None else self._version(self._asked(
            lambda: self._mlflow.get_model_version(name, str(number))))

    def register(self, name: str, run_id: str, folder: Path, tags: dict[str, str]) -> Version:
        """Copy a model folder to the artifacts of its run and register it; the same one twice is one.

        The copy has a place of its own by the tags holds, step and exported_step: a run that is extended makes other
        files, and those of its earlier version stay.
        """
        known = [found for found in self._versions(name, run_id) if tags.items() <= found.tags.items()]
        if known:
            return known[-1]
        place = "-".join([tags.get("holds", "model"), *(tags[key] for key in ("step", "exported_step") if key in tags)])
        with _patient():
            self._asked(lambda: self._mlflow.log_artifacts(run_id, str(folder), place))
        if all(model.name != name for model in self._models(name)):
            self._asked(lambda: self._mlflow.create_registered_model(name))
        source = self._asked(lambda: self._mlflow.get_run(run_id)).info.artifact_uri.rstrip("/") + f"/{place}"
        return self._version(self._asked(lambda: self._mlflow.create_model_version(
            name, source, run_id, tags=tags, await_creation_for=0)))

    def name_holder(self, version: Version, alias: str) -> None:
        """Give a version an alias; who had it loses it and stays."""
        self._asked(lambda: self._mlflow.set_registered_model_alias(version.name, alias, str(version.number)))

    def drop(self, name: str, alias: str) -> None:
        """Take an alias from who has it."""
        self._asked(lambda: self._mlflow.delete_registered_model_alias(name, alias))

    def _models(self, name: str) -> Any:
        return self._asked(lambda: self._mlflow.search_registered_models(f"name='{_quoted(name)}'"))

    def _versions(self, name: str, run_id: str) -> list[Version]:
        found = self._asked(lambda: self._mlflow.search_model_versions(f"run_id='{run_id}'"))
        return sorted((self._version(item) for item in found if item.name == name), key=lambda item: item.number)

    def _asked(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # MLflow's own, requests', the database driver's
            reason, shown = clean(" ".join(str(error).split()), self._uri)[:300], clean(self._uri, self._uri)
            if refuses(error):
                raise UserError(f"MLflow at {shown} {REFUSES} ({reason}): {LOGIN}") from error
            raise UserError(f"MLflow at {shown} refuses this or does not answer ({reason}): start the server, or type "
                            "uri=ADDRESS of one that answers") from error

    @staticmethod
    def _version(found: Any) -> Version:
        return Version(found.name, int(found.version), found.run_id, dict(found.tags))


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _quoted(name: str) -> str:
    if "'" in name:
        raise UserError(f"a registered model's name has no quotes: {name!r} does, type another name=")
    return name


@contextmanager
def _patient() -> Iterator[None]:
    """Files of a model may be gigabytes, and tracking's own patience is for small requests; what the user set wins."""
    before = os.environ.get(_TIMEOUT)
    if before == ENVIRONMENT[_TIMEOUT]:
        os.environ[_TIMEOUT] = UPLOAD
    try:
        yield
    finally:
        if before is not None:
            os.environ[_TIMEOUT] = before
