"""What the tests of jobs share: an environment without settings of its own, a fake docker, botocore read once."""

import os
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from botocore.loaders import JSONFileLoader

from dreambooth.storage import folders
from tests.support.s3_server import KEYS


@pytest.fixture(scope="session", autouse=True)
def services_are_read_once() -> Iterator[None]:
    """Each new client reads the description of its service, which takes a second for SageMaker."""
    read = cache(lambda path: load_file(JSONFileLoader(), path))
    load_file = JSONFileLoader.load_file

    def load(loader: JSONFileLoader, path: str) -> Any:
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", load)
        yield


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def environment(credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = folders.RemoteContent("0" * 10, is_folder=True, is_complete=True)
    monkeypatch.setattr(folders, "inspect", lambda uri: content)
    for key in ("DREAMBOOTH_IMAGE", "DREAMBOOTH_ROLE", "DREAMBOOTH_S3", "DREAMBOOTH_SWEEP", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)
    for kind in ("ADMIN", "USER"):  # no defaults files of the SageMaker SDK, those of this machine included
        monkeypatch.delenv(f"SAGEMAKER_{kind}_CONFIG_OVERRIDE", raising=False)
    for variable in ("XDG_CONFIG_HOME", "XDG_CONFIG_DIRS"):
        monkeypatch.setenv(variable, str(tmp_path / "xdg"))


ENGINE = """#!/bin/sh
# Fake docker: reads the mounts and does what a training image does.
case "$1" in container) echo "Error: No such container" >&2; exit 1;; esac
while [ $# -gt 0 ]; do
  case "$1 $2" in "--volume "*:/opt/ml) base="${2%:/opt/ml}";; esac
  last="$1"; shift
done
[ "$last" = train ] || exit 9
if grep -q '"train.seed": "3"' "$base/input/config/hyperparameters.json"; then
  echo "photo.jpg is broken" > "$base/output/failure"; exit 1; fi
echo 'training 2/2  9.9/s  loss 0.125'
echo '{"objective": 0.5, "step": 2}' > "$base/model/result.json"
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "bin" / "docker"
    path.parent.mkdir()
    path.write_text(ENGINE)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return str(path)
