"""Errors of a transfer are one sentence, and faults leave nothing half there or lost."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dreambooth import cli
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.storage import __main__ as storage_command
from dreambooth.storage import download, folders, manifest, s3_bucket
from dreambooth.utils import atomic_files
from tests.storage.bucket_content import content, prefix
from tests.support.s3_server import (
    COMMAND,
    FAULTS,
    PART_SIZE,
    Server,
    plain_client,
    trial,
    write_model,
)
from tests.support.warm_python import PYTHON

# -- errors -----------------------------------------------------------------------------------------------------------

def test_no_credentials(server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"no AWS credentials.*type aws configure"):
        folders.download(uri, tmp_path)


def test_no_bucket(server: Server, tmp_path: Path) -> None:
    write_model(tmp_path / "model", 1)
    with pytest.raises(UserError, match="bucket not-there does not exist"):
        folders.download("s3://not-there/x", tmp_path)
    with pytest.raises(UserError, match="bucket not-there does not exist"):
        folders.upload(tmp_path / "model", "s3://not-there/x")


def test_an_empty_address(server: Server, tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError, match="nothing at s3://"):
        folders.download(uri, tmp_path)


def test_no_permission(server: Server, tmp_path: Path, uri: str) -> None:
    server.fault = lambda number, method: "denied"
    with pytest.raises(UserError, match="no permission for s3:ListBucket"):
        folders.download(uri, tmp_path)


def test_wrong_region(server: Server, tmp_path: Path, uri: str) -> None:
    server.fault = lambda number, method: "elsewhere"
    with pytest.raises(UserError, match="is in the region eu-west-1: set AWS_DEFAULT_REGION"):
        folders.download(uri, tmp_path)


def test_no_network(server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3_bucket, "ATTEMPTS", 2)
    with pytest.raises(UserError, match=r"AWS did not answer.*repeat the command"):
        folders.download(uri, tmp_path)


def test_texts_that_are_no_s3_address() -> None:
    for text in ("s3://", "s3://bucket", "photos", "s3://bucket//"):
        with pytest.raises(UserError, match="is not an S3 address: type s3://BUCKET/PREFIX"):
            s3_bucket.S3Location.parse(text)


def test_a_disk_that_is_too_small_is_an_error_before_the_download(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    usage = download.shutil.disk_usage(".")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DoesNotFit, match=r"storage\.cache=DIR"):
        folders.download(uri, tmp_path / "cache")


def test_files_of_an_interrupted_download_count_as_disk_space_already_used(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    server.calls.clear()
    server.fault = lambda number, method: "denied" if number > 6 else None
    with pytest.raises(UserError, match="no permission"):
        folders.download(uri, tmp_path / "cache", parallel=1)
    server.fault = lambda number, method: None
    [temporary] = (tmp_path / "cache/tests").glob(".writing-*")
    files = [path.stat() for path in temporary.rglob("*") if path.is_file()]
    present = sum(min(file.st_blocks * 512, file.st_size) for file in files)
    assert present >= PART_SIZE
    usage = download.shutil.disk_usage(".")
    free = sum(map(len, want.values())) - present
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=free - 1))
    with pytest.raises(DoesNotFit):
        folders.download(uri, tmp_path / "cache")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=free))
    assert content(folders.download(uri, tmp_path / "cache")) == want


@pytest.mark.parametrize("uploaded_by", ["upload", "another tool"])
def test_a_disk_that_fills_up_during_the_download_is_an_error(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, uploaded_by: str) -> None:
    def full(*words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    if uploaded_by == "another tool":
        plain_client().delete_object(Bucket="tests", Key=f"{prefix(uri)}/{manifest.NAME}")
    with monkeypatch.context() as patched, pytest.raises(DoesNotFit, match=r"disk of .* is full: free some space"):
        patched.setattr(os, "pwrite", full)
        patched.setattr(atomic_files, "sync", full)
        folders.download(uri, tmp_path / "cache")
    assert content(folders.download(uri, tmp_path / "cache"))


def test_temporary_files_of_a_killed_download_are_not_in_the_folder(server: Server, tmp_path: Path, uri: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=b"photo")
    server.fault = lambda number, method: "denied" if "b.jpg" in server.calls[number][1] else None
    with pytest.raises(UserError, match="no permission"):
        folders.download(uri, tmp_path)
    server.fault = lambda number, method: None
    [temporary] = (path for path in tmp_path.glob("tests/.writing-*"))
    (temporary / ".writing-0123abcd-b.jpg").write_bytes(b"pho")  # what SIGKILL leaves
    assert content(folders.download(uri, tmp_path)) == {"a.jpg": b"photo", "b.jpg": b"photo"}


def test_a_cache_that_cannot_be_written_is_an_error(server: Server, tmp_path: Path, uri: str) -> None:
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"photo")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*type storage\.cache=DIR"):
        folders.download(uri, tmp_path / "file")


def test_a_missing_permission_to_list_is_named(server: Server, tmp_path: Path, uri: str) -> None:
    """Without permission for s3:ListBucket, AWS answers 403 for an object that does not exist."""
    write_model(tmp_path / "model", 1)
    server.fault = lambda number, method: "denied" if method != "PUT" else None
    message = r"s3:GetObject on .* or it does not exist and there is no permission for s3:ListBucket"
    with pytest.raises(UserError, match=message):
        folders.upload(tmp_path / "model", uri)


@pytest.mark.parametrize("parallel", ["0", "65"])
def test_the_number_of_transfers_is_checked(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], parallel: str) -> None:
    monkeypatch.setattr(cli, "_exit_codes", [])
    monkeypatch.setattr(sys, "argv", ["storage", "upload", str(tmp_path), "s3://b/x", "--parallel", parallel])
    with pytest.raises(SystemExit, match="1"):
        storage_command.main()
    assert capsys.readouterr().err == f"dreambooth: --parallel must be from 1 to 64, not {parallel}\n"


def test_a_bug_keeps_its_traceback(server: Server, uri: str) -> None:
    def bug() -> None:
        raise AssertionError

    with pytest.raises(AssertionError):
        s3_bucket.call_with_retries(bug, "s3:GetObject", uri)


def test_without_boto3_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = ("import sys; sys.modules['boto3'] = None; sys.argv = ['storage', 'download', 's3://b/x', '.']; "
            "from dreambooth.storage.__main__ import main; main()")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ran.returncode, ran.stderr) == (
        1, "dreambooth: s3:// needs a package: pip install 'dreambooth[s3]'\n")


# -- faults -----------------------------------------------------------------------------------------------------------

TWENTY = [(FAULTS[seed % len(FAULTS)], 100 + seed) for seed in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, seed", TWENTY)
def test_transfers_under_faults(
        running: Server, tmp_path: Path, kind: str, seed: int) -> None:
    """20 trials; `make proof` runs 100."""
    codes = trial(running, tmp_path, kind, seed)
    if kind == "killed":
        assert -9 in codes


@pytest.mark.slow
def test_200_mb_are_equal_after_upload_and_download(running: Server, tmp_path: Path) -> None:
    """With the real part size."""
    (tmp_path / "model").mkdir()
    with (tmp_path / "model/weights.safetensors").open("wb") as file:
        for _ in range(190):
            file.write(os.urandom(2**20))
    (tmp_path / "model/small.safetensors").write_bytes(os.urandom(10 * 2**20))
    for words in (["upload", str(tmp_path / "model"), "s3://tests/large"],
                  ["download", "s3://tests/large", str(tmp_path / "cache")]):
        code = COMMAND.format(part_size=2**24, timeout=folders.READ_TIMEOUT)
        assert subprocess.run([PYTHON, "-c", code, *words], check=False).returncode == 0
    [downloaded] = [path for path in (tmp_path / "cache/tests").iterdir() if not path.name.startswith(".")]
    for name in ("weights.safetensors", "small.safetensors"):
        assert subprocess.run(["cmp", tmp_path / "model" / name, downloaded / name], check=False).returncode == 0


def test_the_test_server_rejects_a_wrong_checksum(server: Server) -> None:
    from botocore.exceptions import ClientError

    wrong: dict[str, Any] = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": "A" * 43 + "="}
    with pytest.raises(ClientError, match="BadDigest"):
        plain_client().put_object(Bucket="tests", Key="wrong", Body=b"x", **wrong)
