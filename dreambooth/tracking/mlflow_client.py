"""Default settings of the MLflow client, and functions that inspect the errors of the client. Imports no MLflow."""

import os

DEFAULTS = {  # with MLflow's defaults, the client waits minutes for a dead server
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
REFUSES_USER = "refuses this user"
LOGIN_HINT = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of a user with EDIT permission there"


def set_default_environment() -> None:
    """Set the environment variables of DEFAULTS, except variables that the user has set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def is_refusal(error: Exception) -> bool:
    """Return whether the server responded that it does not know the user, or that the user may not make the request."""
    return http_status(error) in (401, 403)


def http_status(error: Exception) -> int:
    """Return the HTTP status of an error that MLflow or the library `requests` raised; 0 if there was no response."""
    response = getattr(error, "response", None)
    return int(getattr(error, "get_http_status_code", lambda: getattr(response, "status_code", 0))())
