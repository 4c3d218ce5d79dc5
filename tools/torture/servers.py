"""Runs with an MLflow server that is dead, hangs, fails or refuses. No run stops or waits for it; results are equal."""

import contextlib
import time

from tests.tracking.mlflow_servers import closed_port, listening
from tools.torture.trial import Place, TortureError, Trial


def _answer(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno".encode()


SERVERS: dict[str, bytes | None] = {
    "hanging": None, "500 for every request": _answer("500 Internal Server Error"),
    "503 for every request": _answer("503 Service Unavailable"), "refusing (401)": _answer("401 Unauthorized"),
    "refusing (403)": _answer("403 Forbidden")}


def trials() -> list[Trial]:
    """The trials of this file."""
    return [Trial("MLflow server", name, run_with_server, (name,)) for name in ("dead", *SERVERS)]


def run_with_server(place: Place, name: str) -> str:
    """Run with a server of this kind, and compare the run with the reference. Return exit code and seconds."""
    with contextlib.ExitStack() as stack:
        port = closed_port() if name == "dead" else stack.enter_context(listening(SERVERS[name]))[0]
        begin = time.monotonic()
        code = place.train("tracking=mlflow", f"tracking.uri=http://127.0.0.1:{port}")
        seconds = time.monotonic() - begin
    if code:
        raise TortureError(f"exit code {code}: {place.sentence()}")
    return f"exit code 0 after {seconds:.0f} s, {place.repeat()}"
