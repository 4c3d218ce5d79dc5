"""The committed files of workflows/, and one stage of them as a process."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreambooth.config import compose
from tests.support.warm_python import PYTHON

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows"
Json = dict[str, Any]
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
SPACES = sorted(path.stem for path in (compose.conf_dir() / "sweep").glob("*.yaml"))


def documents(name: str) -> list[Json]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


OBJECTS = [pytest.param(one, id=f"{name}: {one['kind']}") for name in FILES for one in documents(name)
           if one.get("kind") not in (None, "Kustomization")]


# -- a stage -------------------------------------------------------------------------------------------------------

def run_stage(folder: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "dreambooth.stage", name, "--out", str(folder / "out"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
