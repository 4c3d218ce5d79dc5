"""Default settings of the MLflow client, and functions about errors. Importing this file does not import MLflow."""

import contextlib
import logging
import os

from dreambooth.tracking.mlflow_database import database_file, is_local
from dreambooth.utils import permissions, quoting
from dreambooth.utils.masking import mask_urls

TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
DEFAULTS = {  # with MLflow's defaults, the client waits minutes for a dead server
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    TIMEOUT_VARIABLE: "5", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
REFUSES_USER = "refuses this user"
MANAGED_HINT = "allow this role the actions of sagemaker-mlflow on the ARN (docs/sagemaker.md lists them)"
LOGIN_HINT = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of a user with EDIT permission there"


def set_default_environment() -> None:
    """Set the environment variables of DEFAULTS, except those that the user has set, and the level of two loggers."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # MLflow logs the traceback of each error of a database before it raises the error, which the caller reports.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # If sagemaker-mlflow is installed, it fails for each request to a server that has no ARN, which changes nothing.
    logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)


def check_answers(uri: str) -> None:
    """Raise an error of the library `requests` if the server at `uri` cannot be reached or does not answer in time.

    Call this before MLflow is imported: the import takes seconds of CPU time, and is useless if the server does not
    answer. If `uri` is not an HTTP address, do nothing.
    """
    if not uri.startswith(("http://", "https://")):
        return
    import requests

    seconds = float(os.environ.get(TIMEOUT_VARIABLE, DEFAULTS[TIMEOUT_VARIABLE]))
    with contextlib.suppress(requests.exceptions.SSLError):  # MLflow may be told to accept the certificate
        requests.get(f"{uri.rstrip('/')}/health", timeout=seconds, stream=True, allow_redirects=False).close()


def is_refusal(error: Exception) -> bool:
    """Return whether `error` means that the MLflow server, or the file system of a local database, refuses the user.

    The server does not know the user (HTTP status 401), or the user lacks a permission (403, or PermissionError).
    """
    return http_status(error) in (401, 403) or permissions.find_refusal(error) is not None


def remedy(uri: str, error: Exception | None) -> str:
    """Return what the user can do, as a part of a sentence, after MLflow at `uri` could not be used.

    Args:
        error: the error; None: MLflow did not answer in time.
    """
    if isinstance(error, DeletedExperimentError):
        return error.remedy
    if error and (refusal := permissions.find_refusal(error)):
        return f"type {refusal.command()}"
    if error and is_refusal(error):
        return MANAGED_HINT if uri.startswith("arn:") else LOGIN_HINT
    if is_local(uri):
        return f"make {database_file(uri) or 'its folder'} readable and writable, or move it away to get a new one"
    return MANAGED_HINT if uri.startswith("arn:") else "start the server (mlflow server --port ...)"


class DeletedExperimentError(Exception):
    """The experiment of a run has been deleted in MLflow. Its name stays taken until it is restored.

    Args:
        experiment_key: the configuration key that names the experiment.
    """

    def __init__(self, name: str, number: str, uri: str, experiment_key: str) -> None:
        super().__init__(f"has deleted the experiment {name}")
        address = quoting.shell_word(mask_urls(uri, uri))
        self.remedy = (f"type MLFLOW_TRACKING_URI={address} mlflow experiments restore --experiment-id {number}, or "
                       f"{experiment_key}=NAME for another experiment")


def bad_request(message: str) -> Exception:
    """Return the error that a model's `predict` raises for a wrong value: MLflow's server answers with status 400."""
    from mlflow.exceptions import MlflowException

    error: Exception = MlflowException.invalid_parameter_value(message)
    return error


def http_status(error: Exception) -> int:
    """Return the HTTP status of an error that MLflow or the library `requests` raised; 0 if there was no response."""
    response = getattr(error, "response", None)
    return int(getattr(error, "get_http_status_code", lambda: getattr(response, "status_code", 0))())
