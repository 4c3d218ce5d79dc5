"""Digests of model weights; JSON files: strict when written, forgiving when read; places that cannot be written."""

import errno
import json
import math
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import zeros

from dreambooth.errors import DoesNotFit, UserError
from dreambooth.tracking.journal import Journal
from dreambooth.utils import atomic_files


def digest(folder: Path, **files: str) -> str | None:
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_of_", "-of-").replace("_in_", "/")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content)
    return atomic_files.weights_digest(folder)


def test_bin_weights_changed_in_place_have_another_digest(tmp_path: Path) -> None:
    digests = {digest(tmp_path, **{name: content}) for name in (
        "unet_in_diffusion_pytorch_model__bin", "text_encoder_in_pytorch_model__bin") for content in ("one", "two")}
    assert len(digests) == 4


def test_bin_files_beside_safetensors_do_not_count(tmp_path: Path) -> None:
    """The digest of such a model is part of the names of earlier run folders. diffusers loads the .safetensors file."""
    before = digest(tmp_path, unet_in_diffusion_pytorch_model__safetensors="one")
    assert before == "95aa143a536a80486deeca317db4123217cb7a0e92ae9fe455fb30b24b868c41"
    assert digest(tmp_path, unet_in_diffusion_pytorch_model__bin="two", unet_in_optimizer__bin="x") == before
    assert digest(tmp_path, vae_in_optimizer__bin="x") == before
    assert digest(tmp_path, unet_in_diffusion_pytorch_model__fp16__bin="other variant") != before


def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": (True, "NaN", None)}
    atomic_files.write_json(tmp_path / "a.json", content)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == {
        "a": None, "b": [1.5, None, {"c": None}], "d": [True, "NaN", None]}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"3", b"\xff\xfe", b"[" * 100_000])
def test_a_file_without_an_object_is_none(content: bytes, tmp_path: Path) -> None:
    assert atomic_files.read_object(tmp_path / "a.json") is None
    (tmp_path / "a.json").write_bytes(content)
    assert atomic_files.read_object(tmp_path / "a.json") is None


def test_checking_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    atomic_files.check_writable(tmp_path / "a/b", "type another")
    atomic_files.check_writable(tmp_path, "type another")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/x", "file", "n" * 300, "link"])
def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(UserError, match=r"could not be written \(.*\): type another$"):
        atomic_files.check_writable(tmp_path / name, "type another")


def test_a_full_disk_is_told_from_other_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(DoesNotFit, match="free some space"):
        atomic_files.check_writable(tmp_path, "type another")
    for message, kind in (("I/O error: No space left on device (os error 28)", DoesNotFit),
                          ("I/O error: Permission denied (os error 13)", UserError), ("no header", UserError)):
        assert type(atomic_files.write_failure("x", SafetensorError(message), "type another")) is kind


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_files_and_folders_follow_the_umask(umask: int, tmp_path: Path) -> None:
    """safetensors writes files that only their owner may read; a copy of a folder has the mode of the original."""
    (tmp_path / "given").mkdir(mode=0o700)
    before = os.umask(umask)
    try:
        with atomic_files.write_file(tmp_path / "cache.safetensors") as temporary:
            save_file({"a": zeros(1)}, temporary)
        with atomic_files.write_folder(tmp_path / "model") as folder:
            shutil.copytree(tmp_path / "given", folder, dirs_exist_ok=True)
            (folder / "unet").mkdir()
            save_file({"a": zeros(1)}, folder / "unet/model.safetensors")
            (folder / "model_index.json").write_text("{}")
        Journal(tmp_path / "metrics.jsonl").close()
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
             for path in tmp_path.rglob("*") if path.name != "given"}
    assert modes == {name: mode & ~umask for name, mode in {
        "cache.safetensors": 0o666, "model": 0o777, "model/unet": 0o777, "model/unet/model.safetensors": 0o666,
        "model/model_index.json": 0o666, "metrics.jsonl": 0o666}.items()}
