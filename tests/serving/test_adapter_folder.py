"""The folder of adapters while a server runs: entries come, go, or cannot be read."""

import os
from pathlib import Path

import pytest

from dreambooth.serving import adapter_folder
from dreambooth.serving.adapter_folder import Adapters


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(adapter_folder, "SCAN_INTERVAL", 0.0)
    for name in ("cat", "dog"):
        (tmp_path / "adapters" / f"{name}.safetensors").parent.mkdir(exist_ok=True)
        (tmp_path / "adapters" / f"{name}.safetensors").touch()
    return tmp_path / "adapters"


def test_an_entry_that_cannot_be_read_does_not_hide_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lost+found").mkdir()
    find = adapter_folder.locate_adapter

    def refuse(path: Path) -> Path | None:
        if "lost+found" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return find(path)

    monkeypatch.setattr(adapter_folder, "locate_adapter", refuse)
    assert list(Adapters(str(folder)).paths()) == ["cat", "dog"]


def test_a_folder_that_has_gone_keeps_its_last_adapters(folder: Path) -> None:
    adapters = Adapters(str(folder))
    assert adapters.has("dog")
    folder.rename(folder.with_name("away"))
    assert adapters.has("dog") and not adapters.has("bird")
    folder.with_name("away").rename(folder)
    (folder / "bird.safetensors").touch()
    assert adapters.has("bird")


def test_a_name_that_json_cannot_express_is_left_out(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.safetensors")).touch()
    assert list(Adapters(str(folder)).paths()) == ["cat", "dog"]
