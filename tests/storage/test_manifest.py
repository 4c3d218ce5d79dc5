"""Manifests of local folders: they name the file that has changed, and large files are hashed in parts."""

from hashlib import sha256
from pathlib import Path

import pytest

from dreambooth.storage import manifest
from dreambooth.utils import atomic_files
from tests.support.runs import flip_bit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with manifest.write_folder(tmp_path / "model") as aside:
        (aside / "unet").mkdir()
        (aside / "unet/weights.safetensors").write_bytes(bytes(1000))
        (aside / "README.md").write_text("a card")
        (aside / "empty").touch()
    return tmp_path / "model"


def test_a_file_that_changed_is_named(folder: Path) -> None:
    assert manifest.find_damage(folder) is None
    (folder / "another").write_text("files that are not in the manifest do not count")
    assert manifest.find_damage(folder) is None
    flip_bit(folder / "unet/weights.safetensors")
    assert manifest.find_damage(folder) == "unet/weights.safetensors has other content"
    assert manifest.find_damage(folder, contents=False) is None
    assert manifest.find_damage(folder, counts=lambda name: name == "README.md") is None
    (folder / "unet/weights.safetensors").write_bytes(bytes(999))
    assert manifest.find_damage(folder, contents=False) == "unet/weights.safetensors has another size"
    (folder / "unet/weights.safetensors").unlink()
    assert manifest.find_damage(folder, contents=False) == "unet/weights.safetensors is missing"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": 1, "files": {"../x": 1}}', b"\xff"])
def test_a_damaged_manifest_is_damage(content: bytes, folder: Path) -> None:
    (folder / manifest.NAME).write_bytes(content)
    assert manifest.find_damage(folder) == f"{manifest.NAME} cannot be read"


def test_a_folder_without_a_manifest_has_no_known_damage(folder: Path) -> None:
    (folder / manifest.NAME).unlink()
    flip_bit(folder / "README.md")
    assert manifest.find_damage(folder) is None


def test_a_file_of_several_parts_is_hashed_in_order(tmp_path: Path) -> None:
    content = bytes(range(250)) * 10
    (tmp_path / "file").write_bytes(content)
    entry = manifest.hash_file(tmp_path / "file", part_size=600)
    assert entry.parts == tuple(sha256(content[at:at + 600]).hexdigest() for at in range(0, 2500, 600))
    assert (entry.size, entry.part_size) == (2500, 600)


def test_files_are_hashed_before_the_folder_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "hash_folder", fail)
    with pytest.raises(OSError, match="No space"), manifest.write_folder(tmp_path / "model") as aside:
        (aside / "file").touch()
    assert list(tmp_path.iterdir()) == []
    assert not atomic_files.read_object(tmp_path / "model" / manifest.NAME)
