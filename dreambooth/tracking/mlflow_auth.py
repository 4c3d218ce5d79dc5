"""A tracking server that answers and does not let this user in: which errors say so, and what to type. No MLflow."""

REFUSES = "refuses this user"
LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of somebody who may EDIT there"


def refuses(error: Exception) -> bool:
    """The server does not know who asks, or lets them do something else only."""
    return status(error) in (401, 403)


def status(error: Exception) -> int:
    """Of HTTP; 0: there was no answer."""
    response = getattr(error, "response", None)
    return int(getattr(error, "get_http_status_code", lambda: getattr(response, "status_code", 0))())
