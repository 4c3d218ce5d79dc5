"""Finds out whether the model hub can be reached.

Without a network, the hub's library would try every file six times, for 23 seconds, and then report that the file is
missing. This module asks first whether the name of the hub can be resolved.
"""

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

_CONNECTION_ERRORS = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "ConnectionError"}


def is_local(source: str) -> bool:
    """Return whether a model's source is a path on this machine, which may be missing, and not a hub id."""
    return source.startswith((".", "/", "~")) or Path(source).exists()


def local_files_only(source: str, offline: bool) -> bool:
    """Return whether a model must be loaded without asking the hub.

    This is so if `offline` is set, if `source` is a path on this machine, or if the hub's name cannot be resolved.

    Args:
        source: folder or hub id of the model.
        offline: the user's setting.
    """
    return offline or is_local(source) or unresolved() is not None


@cache
def unresolved() -> str | None:
    """Return why the name of the hub cannot be resolved; None if it can be, or if a proxy resolves names."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname or ""
    if getproxies().keys() & {"http", "https", "all"}:
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{host} could not be resolved: {error.strerror}"
    return None


def download(source: str, patterns: list[str], local_files_only: bool) -> Path:
    """Return a local folder with the files of a hub model that match `patterns`. Download the files that are missing.

    Args:
        local_files_only: whether nothing is downloaded.

    Raises:
        OSError, ValueError: the model could not be downloaded, or is not on this machine.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=local_files_only))
    except HfHubHTTPError as error:
        raise OSError(str(error)) from error


def download_pipeline(source: str, revision: str | None, variant: str | None, local_files_only: bool) -> Path:
    """Return a local folder with the files of a hub model that its diffusers pipeline loads. Download missing files.

    Args:
        revision, variant: options of from_pretrained.
        local_files_only: whether nothing is downloaded.

    Raises:
        OSError, ValueError: the model could not be downloaded, or is not on this machine.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return Path(DiffusionPipeline.download(source, revision=revision, variant=variant,
                                           local_files_only=local_files_only))


def failure_reason(error: BaseException, source: str, offline: bool) -> str:
    """Return why a model could not be loaded: that the hub could not be reached, or the first line of the error.

    Args:
        error: the error of the library that loads the model.
        source: folder or hub id of the model.
        offline: the user's setting. If it is set, or if the source is a path, the library did not ask the hub.
    """
    asked_hub = not offline and not is_local(source)
    if asked_hub and (reason := unresolved()):
        return reason
    cause: BaseException | None = error
    while asked_hub and cause:
        if _CONNECTION_ERRORS & {kind.__name__ for kind in type(cause).__mro__}:
            return f"the hub could not be reached: {first_line(cause)}"
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def is_gated(error: BaseException) -> bool:
    """Return whether the hub refused a model because the user has not accepted its license, or has not logged in."""
    cause: BaseException | None = error
    while cause:
        if "GatedRepoError" in {kind.__name__ for kind in type(cause).__mro__}:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, cut to 200 characters."""
    return str(error).strip().partition("\n")[0][:200]
