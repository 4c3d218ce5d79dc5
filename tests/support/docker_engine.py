"""A Docker engine for the tests of the image: a running one, else Debian's, which is installed and started here.

The engine started here has no network and no registry. Its base image is made from Debian's packages. If pip's index is
a folder of this machine, it is served to the build on loopback. Slow results are cached in CACHE.
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
LOCATION_SETTINGS = ("index-url", "extra-index-url", "find-links")  # pip's settings that may be folders
OTHER_SETTINGS = ("trusted-host", "timeout", "no-index")


def run(*command: str | Path, timeout: float = 900, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output."""
    args = [str(arg) for arg in command]
    return subprocess.run(args, capture_output=True, text=True, timeout=timeout, check=False, **more)


def must(*command: str | Path, timeout: float = 900, **more: Any) -> str:
    """Run a command that must succeed; return its output."""
    result = run(*command, timeout=timeout, **more)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


@dataclass(frozen=True)
class Engine:
    """A Docker client, its environment, and additional arguments of a build."""

    client: str = "docker"
    environment: dict[str, str] = field(default_factory=dict)
    build_args: tuple[str, ...] = ()

    def __call__(self, *args: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return run(self.client, *args, timeout=timeout, env=os.environ | self.environment)

    def must(self, *args: str | Path, timeout: float = 300) -> str:
        return must(self.client, *args, timeout=timeout, env=os.environ | self.environment)

    def build(self, kind: str, image: str) -> None:
        """Run containers/build with this machine's pip settings, but without its PIP_ variables."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        with _write_pip_conf() as file:
            environment |= self.environment | {"DOCKER": self.client, "IMAGE": image, "PIP_CONFIG_FILE": str(file)}
            if _has_torch():
                environment["TORCH_INDEX"] = ""
            must(ROOT / "containers/build", kind, *self.build_args, env=environment, timeout=1500)


@contextmanager
def engine() -> Iterator[Engine]:
    """Provide an engine; stop it at the end if it was started here."""
    if run("docker", "info").returncode == 0:
        yield Engine(build_args=("--network", "host"))
        return
    assert os.geteuid() == 0 and shutil.which("apt-get"), \
        "no Docker engine is running: start one, or run this as root on Debian, to install one"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        _install()
        with _start_daemon() as host:
            docker = Engine("/usr/bin/docker", {"DOCKER_HOST": host})
            base_image = _make_base_image(docker)
            yield Engine(docker.client, docker.environment | {"BASE_IMAGE": base_image}, ("--network", "host"))
            docker("image", "prune", "--force")
            docker("builder", "prune", "--force", "--keep-storage", "8GB")


def _install() -> None:
    if missing := [package for command, package in PACKAGES.items() if not shutil.which(command)]:
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "-qq", env=quiet)  # fails if any package source fails, also one that is not needed
        must("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env=quiet)


@contextmanager
def _start_daemon() -> Iterator[str]:
    """Start dockerd without touching the host's network. Only its cache remains afterwards."""
    with tempfile.TemporaryDirectory(prefix="dockerd-") as folder, (Path(folder) / "log").open("w") as log:
        host = f"unix://{folder}/docker.sock"
        daemon = subprocess.Popen(
            ["dockerd", "--data-root", CACHE / "data", "--exec-root", f"{folder}/exec", "-p", f"{folder}/pid", "-H",
             host, "--storage-driver", "overlay2", "--iptables=false", "--ip6tables=false", "--bridge=none"],
            stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 60
            while run("/usr/bin/docker", "info", env=os.environ | {"DOCKER_HOST": host}).returncode:
                log_tail = (Path(folder) / "log").read_text()[-3000:]
                assert daemon.poll() is None and time.monotonic() < deadline, log_tail
                time.sleep(0.5)
            yield host
        finally:
            daemon.terminate()
            daemon.wait(60)
            for namespace in Path(folder).glob("exec/netns/*"):  # containers in the host's network leave mounts behind
                run("umount", namespace)


def _make_base_image(docker: Engine) -> str:
    """A Debian image with Python, made by debootstrap, with this machine's certificates, which mirrors may need."""
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


# -- this machine's pip settings, in a form that a build can use ----------------------------------------------------

def _read_pip_settings() -> dict[str, str]:
    lines = must(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = [line.partition("=") for line in reversed(lines) if "=" in line]  # :env: wins, and is listed first
    return {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, _, value in pairs}


def _has_torch() -> bool:
    """Whether pip's own index has a CPU build of torch, so that PyTorch's index is not needed."""
    version = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    return run(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed",
               f"{version}+cpu").returncode == 0


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@contextmanager
def _write_pip_conf() -> Iterator[Path]:
    """Write a pip.conf in which folders of this machine are replaced by addresses on loopback, and serve these."""
    settings = _read_pip_settings()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "www").mkdir()
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder / "www")))
        stack.callback(server.server_close)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        lines = ["[global]"]
        for key in LOCATION_SETTINGS:
            if key in settings:
                urls = [_serve(location, folder / "www", server.server_port) for location in settings[key].split()]
                lines.append(f"{key} = {' '.join(urls)}")
        lines += [f"{key} = {settings[key]}" for key in OTHER_SETTINGS if key in settings]
        if CERTIFICATES.is_file():
            lines.append(f"cert = {CERTIFICATES}")
        (folder / "pip.conf").write_text("\n".join(lines) + "\n")
        yield folder / "pip.conf"


def _serve(location: str, www: Path, port: int) -> str:
    """The address of a folder. Its parent is served, because its pages may link to sibling folders. Keep an address."""
    local = Path(location.removeprefix("file://"))
    if not local.is_absolute():
        return location
    name = str(len(list(www.iterdir())))
    (www / name).symlink_to(local.parent)
    return f"http://127.0.0.1:{port}/{name}/{local.name}/"
