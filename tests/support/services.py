"""Services of a team on this machine, for tests: PostgreSQL, a local S3, the tracking server of mlflow/, a browser.

Missing programs are installed: Debian's postgresql and chromium. All files are in a folder that is removed.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.s3_server import plain_client, serving

ROOT = Path(__file__).parents[2]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WAIT = 120.0  # seconds that a service has to start


def installed(program: str, package: str) -> str:
    """Path of a program; if it is missing, Debian's package is installed first."""
    if not (found := _find(program)) and os.geteuid() == 0 and shutil.which("apt-get"):
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
            subprocess.run(["apt-get", *words], check=True, capture_output=True, timeout=600,
                           env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        found = _find(program)
    if not found:
        raise RuntimeError(f"{program} is missing: apt-get install {package}")
    return found


def _find(program: str) -> str | None:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return shutil.which(program) or (str(versions[-1]) if versions else None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """Start a server with an empty database `mlflow`; yield the environment variables of libpq."""
    initdb, control = installed("initdb", "postgresql"), installed("pg_ctl", "postgresql")
    root = getpass.getuser() == "root"
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    port, password = free_port(), secrets.token_hex(8)
    (folder / "password").write_text(password)
    if root:  # PostgreSQL refuses to run as root
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")

    def run(*words: str) -> None:
        subprocess.run([*(["runuser", "-u", "postgres", "--"] if root else []), *words], check=True, cwd=folder,
                       stdout=subprocess.DEVNULL, timeout=WAIT)

    data = str(folder / "data")
    try:
        run(initdb, "-D", data, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={folder}/password", "--no-sync")
        run(control, "-D", data, "-w", "-l", str(folder / "log"), "start", "-o",
             f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off")
        variables = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGPASSWORD": password}
        import psycopg2

        connection = psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", password=password, dbname="postgres")
        connection.autocommit = True
        connection.cursor().execute("CREATE DATABASE mlflow")
        connection.close()
        yield variables | {"PGDATABASE": "mlflow"}
    finally:
        with suppress(subprocess.SubprocessError):
            run(control, "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


class TrackingServer:
    """The tracking server, started by mlflow/entrypoint as in its container."""

    def __init__(self, folder: Path, database: dict[str, str], artifacts: str) -> None:
        self.port, self.password, self.log = free_port(), secrets.token_hex(12), folder / "server.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._environment = os.environ | database | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MLFLOW_LISTEN_PORT": str(self.port),
            "MLFLOW_WORKERS": "1", "MLFLOW_ARTIFACTS": artifacts, "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16), "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def credentials(self) -> dict[str, str]:
        """The environment variables of a client."""
        return {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": self.password}

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([ROOT / "mlflow" / "entrypoint"], env=self._environment, stdout=log,
                                             stderr=log, start_new_session=True, cwd=self._folder)
        end = time.monotonic() + WAIT
        while not self.healthy():
            assert self._process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def healthy(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def kill(self) -> None:
        """Kill the server and all of its workers."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            self._process = None


@contextmanager
def team(folder: Path) -> Iterator[TrackingServer]:
    """Start all services; meanwhile the environment of this process holds the credentials of S3 and the server."""
    with postgres() as database, serving():
        plain_client().create_bucket(Bucket="team")
        server = TrackingServer(folder, database, "s3://team/mlflow")
        before = {name: os.environ.get(name) for name in server.credentials}
        os.environ.update(server.credentials)
        try:
            server.start()
            yield server
        finally:
            server.kill()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def browser(server: TrackingServer | None = None) -> Iterator[Any]:
    """Yield a page of Chromium, logged in if a server is given."""
    from playwright.sync_api import sync_playwright

    path = installed("chromium", "chromium")
    login = {"username": "admin", "password": server.password} if server else None
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=FLAGS)
        try:
            context = chromium.new_context(viewport={"width": 1680, "height": 1050}, http_credentials=login)
            context.set_default_timeout(60_000)
            yield context.new_page()
        finally:
            chromium.close()
