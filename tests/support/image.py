"""The CPU image as tests run it; the fixture `image` (conftest.py) builds it once for all of them."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from dreambooth import __version__
from tests.support.docker_engine import Engine

NAME = "dreambooth-test"


@dataclass
class Image:
    """The CPU image, and how to run it."""

    docker: Engine
    tag: str = f"{NAME}:{__version__}-cpu"

    def run(
        self, *words: str, base: Path | None = None, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        mount = ("--volume", f"{base}:/opt/ml") if base else ()
        return self.docker("run", "--rm", "--network", "none", *mount, *options, self.tag, *words)

    def labels(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.docker.must("inspect", "--format", "{{json .Config.Labels}}", self.tag))
        return found

    def start(self, base: Path) -> str:
        """`train`, in the background; the name of the container."""
        name = f"{NAME}-{uuid4().hex[:8]}"
        self.docker.must("run", "--detach", "--network", "none", "--name", name, "--volume", f"{base}:/opt/ml",
                         self.tag, "train")
        return name

    def log(self, name: str) -> str:
        found = self.docker("logs", name)
        return found.stdout + found.stderr

    def code(self, name: str) -> int:
        """Wait for the end; the exit code."""
        return int(self.docker.must("wait", name).strip())
