"""Lets a Deployment of the cluster serve another model, checks its pictures, and goes back if they fail.

The program runs in a pod of the same cluster, with a service account that may read and patch the Deployment. Imports no
torch.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from dreambooth.errors import UserError
from dreambooth.kubernetes import serving

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # Kubernetes mounts it in every pod
PREVIOUS = "dreambooth/previous-model"  # annotation: the model that the Deployment served before a roll-out
TIMEOUT = (serving.START_MINUTES + 5) * 60.0  # seconds until the new pods must be ready
POLL = 5.0  # seconds between two looks at the Deployment
REQUEST_TIMEOUT = 30  # seconds
RETRIES = 5  # repetitions of a request within about 15 seconds

log = logging.getLogger(__name__)


class Deployment:
    """A Deployment that build_deployment has described, in the namespace of this pod."""

    def __init__(self, name: str, api: str, namespace: str, token: str, authority: str | None) -> None:
        """Args:
            api: address of the API server.
            token: token of a service account that may read and patch the Deployment.
            authority: file with the certificate of the API server; None: http.
        """
        self.name, self.service_url = name, f"http://{name}.{namespace}.svc"
        self._url = f"{api}/apis/apps/v1/namespaces/{namespace}/deployments/{name}"
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {token}"
        self._session.verify = authority or True
        # Both methods may be repeated: the patch sets values.
        retries = Retry(total=RETRIES, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                        allowed_methods={"GET", "PATCH"}, raise_on_status=False)
        self._session.mount(api, HTTPAdapter(max_retries=retries))

    @classmethod
    def of_this_cluster(cls, name: str) -> "Deployment":
        """Return a Deployment of the cluster and namespace in which this process runs.

        Raises:
            UserError: this process does not run in a pod with a service account.
        """
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{key}") for key in ("HOST", "PORT"))
        try:
            token, namespace = ((ACCOUNT / key).read_text("utf-8").strip() for key in ("token", "namespace"))
        except OSError as error:
            raise UserError("the stage deploy runs in a pod with a service account, and this is none: type kubectl "
                            f"set env deployment/{name} {serving.MODEL}=models:/NAME/VERSION") from error
        host = f"[{host}]" if host and ":" in host else host
        return cls(name, f"https://{host}:{port}", namespace, token, str(ACCOUNT / "ca.crt"))

    def read(self) -> dict[str, Any]:
        """Return the Deployment as the API describes it."""
        return self._call("GET")

    def set_model(self, model: str, annotation: str) -> None:
        """Let the pods serve another model, and write the annotation PREVIOUS. Old pods stay until others are ready."""
        container = {"name": serving.CONTAINER, "env": [{"name": serving.MODEL, "value": model}]}
        self._call("PATCH", {"metadata": {"annotations": {PREVIOUS: annotation}},
                             "spec": {"template": {"spec": {"containers": [container]}}}})

    def wait(self) -> None:
        """Wait until all pods are of the present template and ready.

        Raises:
            UserError: the pods are not ready in time, or Kubernetes has given up.
        """
        end = time.monotonic() + TIMEOUT
        while True:
            found = self.read()
            status, replicas = found.get("status") or {}, found["spec"].get("replicas", 1)
            conditions = {one["type"]: one for one in status.get("conditions") or []}
            seen = status.get("observedGeneration", 0) >= found["metadata"].get("generation", 0)
            if seen and all(status.get(key, 0) == replicas for key in (
                    "replicas", "updatedReplicas", "availableReplicas")):
                return
            if seen and conditions.get("Progressing", {}).get("status") == "False":
                reason = conditions["Progressing"].get("message")
                raise UserError(f"the pods of {self.name} did not become ready ({reason}): see kubectl logs "
                                f"deployment/{self.name}")
            if time.monotonic() > end:
                raise UserError(f"the pods of {self.name} are not ready after {TIMEOUT / 60:.0f} minutes: see kubectl "
                                f"logs deployment/{self.name}")
            time.sleep(POLL)

    def _call(self, method: str, patch: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._session.request(
                method, self._url, json=patch, timeout=REQUEST_TIMEOUT,
                headers={"Content-Type": "application/strategic-merge-patch+json"} if patch else None)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found
        except (requests.RequestException, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the Deployment {self.name} cannot be {'changed' if patch else 'read'} ({reason}): apply "
                            "workflows/base and workflows/serving/deployment.yaml first") from error


def roll_out(deployment: Deployment, model: str, replaced: str | None, check: Callable[[str], str]) -> str:
    """Let a Deployment serve `model`, and return a sentence about the result.

    The function may be repeated after an interruption: the model that was served before is in an annotation.

    Args:
        model: a value of the option `run` of the server, such as models:/NAME/3.
        replaced: the champion before; None: there was none. If the Deployment serves an alias of the registry, such as
            models:/NAME@champion, this alias names `model` by now, and the Deployment goes back to `replaced`.
        check: draws and measures pictures of a server at an address. It returns a sentence, or raises UserError.

    Raises:
        UserError: the new pods do not become ready, or `check` has failed. The Deployment serves the model before.
    """
    before, annotation = _served(deployment.read())
    previous = annotation if before == model and annotation else before
    if "@" in previous or previous == model:
        previous = replaced or ""
    if before != model:
        deployment.set_model(model, previous)
    try:
        deployment.wait()
        result = check(deployment.service_url)
    except Exception as error:
        outcome = _go_back(deployment, previous, model)
        if not isinstance(error, UserError):
            log.error("%s", outcome)
            raise
        raise UserError(f"{error}; {outcome}") from error
    return f"{deployment.name} serves {model}: {result}"


def _go_back(deployment: Deployment, previous: str, failed: str) -> str:
    """Let a Deployment serve the model before. Return a sentence that says what it serves now.

    Args:
        previous: the model before; empty: there was none.
        failed: the model that the Deployment serves.
    """
    if not previous:
        return f"{deployment.name} still serves {failed}, because there is no earlier version"
    try:
        deployment.set_model(previous, previous)
        deployment.wait()
    except UserError as error:
        return f"going back to {previous} has failed ({error}): type kubectl rollout undo deployment/{deployment.name}"
    return f"{deployment.name} serves {previous} again"


def _served(found: dict[str, Any]) -> tuple[str, str | None]:
    """Return the model that a Deployment serves, and the annotation PREVIOUS."""
    containers = found["spec"]["template"]["spec"]["containers"]
    models = [variable["value"] for container in containers if container["name"] == serving.CONTAINER
              for variable in container.get("env", ()) if variable["name"] == serving.MODEL]
    if not models:
        raise UserError(f"the Deployment {found['metadata']['name']} has no variable {serving.MODEL}: apply "
                        "workflows/serving/deployment.yaml")
    return models[0], (found["metadata"].get("annotations") or {}).get(PREVIOUS)
