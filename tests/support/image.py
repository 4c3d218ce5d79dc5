"""Runs the CPU image in tests; the fixture `image` (conftest.py) builds it once per session."""

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
    """The CPU image of a Docker engine."""

    docker: Engine
    tag: str = f"{NAME}:{__version__}-cpu"

    def run(
        self, *args: str, base: Path | None = None, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a new container; `base` is mounted at /opt/ml."""
        mount = ("--volume", f"{base}:/opt/ml") if base else ()
        return self.docker("run", "--rm", "--network", "none", *mount, *options, self.tag, *args)

    def labels(self) -> dict[str, str]:
        text = self.docker.must("inspect", "--format", "{{json .Config.Labels}}", self.tag)
        labels: dict[str, str] = json.loads(text)
        return labels

    def start(self, base: Path) -> str:
        """Run `train` in the background; return the name of the container."""
        name = f"{NAME}-{uuid4().hex[:8]}"
        self.docker.must("run", "--detach", "--network", "none", "--name", name, "--volume", f"{base}:/opt/ml",
                         self.tag, "train")
        return name

    def log(self, name: str) -> str:
        logs = self.docker("logs", name)
        return logs.stdout + logs.stderr

    def wait(self, name: str) -> int:
        """Wait for the end of a container; return its exit code."""
        return int(self.docker.must("wait", name).strip())
