"""A Docker engine for the tests of the image: the one that is there, else Debian's own, installed and started here.

The one started here has no network and no registry: its base image comes from Debian's packages, and pip's index, where
it is a folder of this machine, is served to the build on loopback. What takes long to make is kept below CACHE.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreambooth-image"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = {"dockerd": "docker.io", "debootstrap": "debootstrap"}  # command -> Debian package
PLACES = ("index-url", "extra-index-url", "find-links")  # pip's settings that may be folders
KEPT = ("trusted-host", "timeout", "no-index")


def run(*command: str | Path, timeout: float = 900, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; what it prints is in the result."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, **more)


def must(*command: str | Path, timeout: float = 900, **more: Any) -> str:
    """The same, of a command that must succeed."""
    result = run(*command, timeout=timeout, **more)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


@dataclass(frozen=True)
class Engine:
    """A client, and what a build is given besides."""

    client: str = "docker"
    environment: dict[str, str] = field(default_factory=dict)
    build: tuple[str, ...] = ()

    def __call__(self, *words: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return run(self.client, *words, timeout=timeout, env=os.environ | self.environment)

    def must(self, *words: str | Path, timeout: float = 300) -> str:
        return must(self.client, *words, timeout=timeout, env=os.environ | self.environment)

    def make(self, kind: str, image: str) -> None:
        """containers/build, with pip's settings of this machine and none of its PIP_ variables."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        with _pip_configuration() as file:
            environment |= self.environment | {"DOCKER": self.client, "IMAGE": image, "PIP_CONFIG_FILE": str(file)}
            if _has_torch():
                environment["TORCH_INDEX"] = ""
            must(ROOT / "containers/build", kind, *self.build, env=environment, timeout=1500)


@contextmanager
def engine() -> Iterator[Engine]:
    """An engine for as long as it is needed."""
    if run("docker", "info").returncode == 0:
        yield Engine(build=("--network", "host"))
        return
    assert os.geteuid() == 0 and shutil.which("apt-get"), \
        "no Docker engine answers here: start one, or run this as root on Debian, where one is installed"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        _install()
        with _started() as host:
            found = Engine("/usr/bin/docker", {"DOCKER_HOST": host})
            base = _base(found)
            yield Engine(found.client, found.environment | {"BASE_IMAGE": base}, ("--network", "host"))
            found("image", "prune", "--force")
            found("builder", "prune", "--force", "--keep-storage", "8GB")


def _install() -> None:
    if missing := [package for command, package in PACKAGES.items() if not shutil.which(command)]:
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "-qq", env=quiet)  # a source that fails is not always one that is needed
        must("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env=quiet)


@contextmanager
def _started() -> Iterator[str]:
    """dockerd by hand: nothing of the host's network is touched, and nothing of it stays but its cache."""
    with tempfile.TemporaryDirectory(prefix="dockerd-") as folder, (Path(folder) / "log").open("w") as log:
        host = f"unix://{folder}/docker.sock"
        daemon = subprocess.Popen(
            ["dockerd", "--data-root", CACHE / "data", "--exec-root", f"{folder}/exec", "-p", f"{folder}/pid", "-H",
             host, "--storage-driver", "overlay2", "--iptables=false", "--ip6tables=false", "--bridge=none"],
            stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 60
            while run("/usr/bin/docker", "info", env=os.environ | {"DOCKER_HOST": host}).returncode:
                told = (Path(folder) / "log").read_text()[-3000:]
                assert daemon.poll() is None and time.monotonic() < until, told
                time.sleep(0.5)
            yield host
        finally:
            daemon.terminate()
            daemon.wait(60)
            for namespace in Path(folder).glob("exec/netns/*"):  # containers in the host's network leave a mount
                run("umount", namespace)


def _base(docker: Engine) -> str:
    """Debian with Python, by its packages; its certificates are this machine's, for mirrors with one of their own."""
    suite = must("sh", "-c", '. /etc/os-release; echo "$VERSION_CODENAME"').strip()
    key = sha256(CERTIFICATES.read_bytes()).hexdigest()[:8] if CERTIFICATES.is_file() else "none"
    name = f"dreambooth-test-base:{suite}-{key}"
    if docker("image", "inspect", name).returncode:
        with tempfile.TemporaryDirectory() as folder:
            must("debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv,python3-pip",
                 suite, f"{folder}/rootfs")
            if CERTIFICATES.is_file():
                shutil.copyfile(CERTIFICATES, f"{folder}/rootfs{CERTIFICATES}")
            must("tar", "-C", f"{folder}/rootfs", "-cf", f"{folder}/base.tar", ".")
            docker.must("import", f"{folder}/base.tar", name)
    return name


# -- pip's settings of this machine, as a build can use them --------------------------------------------------------

def _settings() -> dict[str, str]:
    lines = must(sys.executable, "-m", "pip", "config", "list").splitlines()
    found = [line.partition("=") for line in reversed(lines) if "=" in line]  # :env:, which wins, is listed first
    return {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, _, value in found}


def _has_torch() -> bool:
    """Whether pip's own settings lead to a CPU build of torch, so that PyTorch's index need not be asked."""
    version = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    return run(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed",
               f"{version}+cpu").returncode == 0


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def _pip_configuration() -> Iterator[Path]:
    """A pip.conf in which folders of this machine are addresses on loopback."""
    settings = _settings()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "www").mkdir()
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder / "www")))
        stack.callback(server.server_close)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        lines = ["[global]"]
        for key in PLACES:
            if key in settings:
                places = [_served(place, folder / "www", server.server_port) for place in settings[key].split()]
                lines.append(f"{key} = {' '.join(places)}")
        lines += [f"{key} = {settings[key]}" for key in KEPT if key in settings]
        if CERTIFICATES.is_file():
            lines.append(f"cert = {CERTIFICATES}")
        (folder / "pip.conf").write_text("\n".join(lines) + "\n")
        yield folder / "pip.conf"


def _served(place: str, www: Path, port: int) -> str:
    """A folder, whose pages may lead to its sister folders, at an address; an address stays."""
    local = Path(place.removeprefix("file://"))
    if not local.is_absolute():
        return place
    name = str(len(list(www.iterdir())))
    (www / name).symlink_to(local.parent)
    return f"http://127.0.0.1:{port}/{name}/{local.name}/"
