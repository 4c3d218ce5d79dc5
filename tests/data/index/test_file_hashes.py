"""The fingerprint of a folder depends on content alone, and an unchanged file is read once."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreambooth.data import captions, color_profiles, image_formats
from dreambooth.data.index import file_hashes
from dreambooth.data.index.file_hashes import NO_FINGERPRINT, fingerprint, open_hashes
from dreambooth.data.index.records import Records
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
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The contents of the files that were read."""
    contents: list[bytes] = []
    monkeypatch.setattr(color_profiles, "is_converted", lambda content: bool(contents.append(content)))
    return contents


def test_the_fingerprint_is_that_of_earlier_versions(folder: Path) -> None:
    total = hashlib.sha256()
    for photo in list_photos(folder):
        for path in (photo, *captions.caption_files(photo)):
            for part in (os.fsencode(path.name), path.read_bytes()):
                total.update(hashlib.sha256(part).digest())
    assert fingerprint(folder) == total.hexdigest()


def test_each_file_is_read_once_though_all_photos_share_the_metadata_file(folder: Path, read: list[bytes]) -> None:
    fingerprint(folder)
    assert sorted(read) == sorted(path.read_bytes() for path in folder.iterdir())


def test_a_later_command_reads_no_unchanged_file(
    folder: Path, tmp_path: Path, read: list[bytes], monkeypatch: pytest.MonkeyPatch
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


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path, tmp_path: Path, read: list[bytes]) -> None:
    fingerprint(folder, run_root=tmp_path)
    fingerprint(folder, run_root=tmp_path)
    assert len(read) == 10


def test_a_photo_that_cannot_be_opened_yet_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "MIN_AGE", -1.0)
    (tmp_path / "1.heic").write_bytes(b"a format of another package, with a profile: acsp")
    before = fingerprint(tmp_path)
    monkeypatch.setattr(color_profiles, "is_converted", lambda content: True)  # with the package
    assert fingerprint(tmp_path) != before


def test_other_decoders_look_at_profiles_again(
    folder: Path, tmp_path: Path, read: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "MIN_AGE", -1.0)
    (folder / "2.png").write_bytes(b"a photo with a profile: acsp")
    fingerprint(folder, run_root=tmp_path)
    read.clear()
    fingerprint(folder, run_root=tmp_path)
    assert read == []
    monkeypatch.setattr(image_formats, "decoder_versions", lambda: "Pillow 99")
    fingerprint(folder, run_root=tmp_path)
    assert read == [b"a photo with a profile: acsp"]


def test_a_file_that_is_replaced_while_it_is_opened_is_not_mixed_with_the_new_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "MIN_AGE", -1.0)
    path, replaced = folder / "1.txt", tmp_path / "other"
    replaced.write_text("another caption")
    monkeypatch.setattr(file_hashes.os, "fstat", lambda file, fstat=os.fstat: (
        replaced.exists() and os.path.samestat(fstat(file), path.stat()) and replaced.rename(path), fstat(file))[1])
    first = open_hashes(None).of(path)
    assert first.sha256 == hashlib.sha256(b"a caption").hexdigest()
    assert open_hashes(None).of(path).sha256 == hashlib.sha256(b"another caption").hexdigest()


def test_a_fingerprint_whose_hashes_cannot_be_saved_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "MIN_AGE", -1.0)
    monkeypatch.setattr(file_hashes, "MIN_BYTES", 1)
    expected, is_dir = fingerprint(folder), Path.is_dir

    def refused(path: Path) -> bool:
        if path == tmp_path:
            raise PermissionError(path)
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refused)
    assert fingerprint(folder, run_root=tmp_path) == expected


def test_entries_of_other_decoders_leave_a_file_that_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "index" / "records.jsonl"
    for end in ("old", "new"):
        records = Records(path)
        for number in range(1002 if end == "old" else 1):
            records.add(f"{number} {end}", number)
        records.save()
    assert Records(path, "new").get("0 new") == 0
    assert path.read_text() == '["0 new",0]\n'


def test_a_pipe_is_not_read(folder: Path) -> None:
    os.mkfifo(folder / "3.png")
    assert fingerprint(folder) == NO_FINGERPRINT
