"""The fingerprint of a folder depends on content alone, and an unchanged file is read once."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreambooth.data import captions
from dreambooth.data.index import file_hashes
from dreambooth.data.index.file_hashes import NO_FINGERPRINT, fingerprint, open_hashes
from dreambooth.data.photos import list_photos
from tests.data.noise_photos import save_noise, write_metadata


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(3):
        save_noise(path / f"{number}.png", seed=number)
    (path / "1.txt").write_text("a caption")
    write_metadata(path, {"0.png": "another caption"})
    yield path
    open_hashes.cache_clear()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    names: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read_bytes(path))
    return names


def test_the_fingerprint_is_that_of_earlier_versions(folder: Path) -> None:
    total = hashlib.sha256()
    for photo in list_photos(folder):
        for path in (photo, *captions.caption_files(photo)):
            for part in (os.fsencode(path.name), path.read_bytes()):
                total.update(hashlib.sha256(part).digest())
    assert fingerprint(folder) == total.hexdigest()


def test_each_file_is_read_once_though_all_photos_share_the_metadata_file(folder: Path, read: list[str]) -> None:
    fingerprint(folder)
    assert sorted(read) == ["0.png", "1.png", "1.txt", "2.png", "metadata.jsonl"]


def test_a_later_command_reads_no_unchanged_file(
    folder: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "MIN_AGE", -1.0)
    monkeypatch.setattr(file_hashes, "MIN_BYTES", 1)
    first = fingerprint(folder, run_root=tmp_path)
    open_hashes.cache_clear()
    read.clear()
    assert fingerprint(folder, run_root=tmp_path) == first
    assert read == []


def test_few_bytes_are_hashed_again_and_leave_no_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "MIN_AGE", -1.0)
    before = sorted(tmp_path.rglob("*"))
    fingerprint(folder, run_root=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_content_of_the_same_size_and_time_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "MIN_AGE", -1.0)
    path = folder / "1.txt"
    first, status = fingerprint(folder, run_root=tmp_path), path.stat()
    path.write_text("B caption")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert fingerprint(folder, run_root=tmp_path) != first


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path, tmp_path: Path, read: list[str]) -> None:
    fingerprint(folder, run_root=tmp_path)
    fingerprint(folder, run_root=tmp_path)
    assert len(read) == 10


def test_a_pipe_is_not_read(folder: Path) -> None:
    os.mkfifo(folder / "3.png")
    assert fingerprint(folder) == NO_FINGERPRINT
