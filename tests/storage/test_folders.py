"""S3 folders, against a local server: content is equal, nothing is half there or lost, errors are one sentence."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.config import Config as BotoConfig

from dreambooth import cli
from dreambooth.config.schema import Config
from dreambooth.config.storage import Storage
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.runs import checkpoint_files, remote_mirror
from dreambooth.storage import __main__ as storage_command
from dreambooth.storage import download, folders, manifest, run_inputs, s3_bucket
from dreambooth.utils import atomic_files
from tests.support.faults import FAST
from tests.support.s3_server import (
    COMMAND,
    FAULTS,
    PART_SIZE,
    Server,
    in_bucket,
    plain_client,
    serving,
    trial,
    write_model,
)
from tests.support.warm_python import PYTHON


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        plain_client().create_bucket(Bucket="tests")
        plain_client().create_bucket(Bucket="faults")
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(s3_bucket, "PAUSE", 0.01)
    monkeypatch.setattr(manifest, "PART_SIZE", PART_SIZE)
    running.calls.clear()
    yield running
    running.fault = lambda number, method: None


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    return "s3://tests/" + re.sub(r"\W", "-", request.node.name)


def prefix(uri: str) -> str:
    return uri.removeprefix("s3://tests/")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_paths(server: Server) -> list[str]:
    """Paths and queries of the PUT requests, such as object names with the number of the part."""
    return [path for method, path in server.calls if method == "PUT"]


def test_a_folder_is_equal_after_upload_and_download(server: Server, tmp_path: Path, uri: str) -> None:
    want = write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    assert {name: text for name, text in in_bucket("tests", prefix(uri)).items() if name != manifest.NAME} == want
    found = folders.download(uri, tmp_path / "cache", complete=True)
    assert content(found) == want
    assert put_paths(server)[-1].endswith(manifest.NAME), "the manifest is not last"


def test_existing_files_are_not_uploaded_or_downloaded_again(server: Server, tmp_path: Path, uri: str) -> None:
    write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    folders.download(uri, tmp_path / "cache")
    before = len(put_paths(server))
    folders.upload(tmp_path / "model", uri)
    assert [path for path in put_paths(server)[before:] if not path.endswith(manifest.NAME)] == []
    reads = len(server.calls)
    folders.download(uri, tmp_path / "cache")
    assert [path for method, path in server.calls[reads:] if method == "GET" and ".safetensors" in path] == []


def test_an_interrupted_upload_continues_with_its_parts(server: Server, tmp_path: Path, uri: str) -> None:
    want = write_model(tmp_path / "model", 1)
    server.fault = lambda number, method: "denied" if "partNumber=4" in server.calls[number][1] else None
    with pytest.raises(UserError, match="no permission for s3:PutObject"):
        folders.upload(tmp_path / "model", uri, parallel=1)
    assert manifest.NAME not in in_bucket("tests", prefix(uri))
    server.fault = lambda number, method: None
    server.calls.clear()
    folders.upload(tmp_path / "model", uri)
    parts = [path for path in put_paths(server) if "unet/weights" in path]
    assert parts
    assert all("partNumber=1" not in path for path in parts), "a part that S3 has was uploaded again"
    assert content(folders.download(uri, tmp_path / "cache")) == want


def test_an_interrupted_download_continues_with_its_parts(server: Server, tmp_path: Path, uri: str) -> None:
    want = write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    server.calls.clear()
    seen: list[int] = []

    def deny_after_six(number: int, method: str) -> str | None:
        seen.append(number)
        return "denied" if len(seen) > 6 else None

    server.fault = deny_after_six
    with pytest.raises(UserError, match="no permission for s3:GetObject"):
        folders.download(uri, tmp_path / "cache", parallel=1)
    assert [path for path in (tmp_path / "cache").glob("*/*") if not path.name.startswith(".")] == []
    server.fault = lambda number, method: None
    gets = sum("safetensors" in path for _, path in server.calls)
    server.calls.clear()
    assert content(folders.download(uri, tmp_path / "cache")) == want
    again = sum("safetensors" in path for _, path in server.calls)
    assert gets > 1 and again < 6 + 2


def test_a_complete_folder_is_never_replaced(server: Server, tmp_path: Path, uri: str) -> None:
    want = write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    write_model(tmp_path / "model", 2)
    with pytest.raises(UserError, match="type another S3 address"):
        folders.upload(tmp_path / "model", uri)
    assert content(folders.download(uri, tmp_path / "cache")) == want


@pytest.mark.parametrize("name", ["model_index.json", "unet/weights.safetensors"])
def test_an_object_of_another_upload_is_never_replaced(server: Server, tmp_path: Path, uri: str, name: str) -> None:
    write_model(tmp_path / "model", 1)
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=b"other")
    server.calls.clear()
    with pytest.raises(UserError, match=f"other content as {name}"):
        folders.upload(tmp_path / "model", uri)
    assert in_bucket("tests", prefix(uri)) == {name: b"other"}
    assert [method for method, _ in server.calls if method != "GET" and method != "HEAD"] == [], "files were uploaded"


@pytest.mark.parametrize("name", ["model_index.json", "unet/weights.safetensors"])
def test_an_object_that_another_upload_creates_meanwhile_is_not_replaced(
        server: Server, tmp_path: Path, uri: str, name: str) -> None:
    write_model(tmp_path / "model", 1)
    created: list[str] = []

    def create_meanwhile(number: int, method: str) -> None:
        path = server.calls[number][1]
        if method in ("PUT", "POST") and f"/{name}" in path and not created:
            created.append(path)
            plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=b"other")

    server.fault = create_meanwhile
    with pytest.raises(UserError, match=f"other content as {name}"):
        folders.upload(tmp_path / "model", uri)
    held = in_bucket("tests", prefix(uri))
    assert held[name] == b"other"
    assert manifest.NAME not in held


def test_files_that_another_tool_uploaded_get_a_manifest(server: Server, tmp_path: Path, uri: str) -> None:
    want = write_model(tmp_path / "model", 1)
    for name, text in want.items():
        plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=text)
    server.calls.clear()
    folders.upload(tmp_path / "model", uri)
    assert put_paths(server) == [f"/tests/{prefix(uri)}/{manifest.NAME}"]
    reads = [path for method, path in server.calls if method == "GET" and "unet/weights" in path]
    assert len(reads) == 6, "an object was read twice"
    assert content(folders.download(uri, tmp_path / "cache", complete=True)) == want


def test_other_content_that_another_tool_uploaded_is_an_error(server: Server, tmp_path: Path, uri: str) -> None:
    want = write_model(tmp_path / "model", 1)["unet/weights.safetensors"]
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/unet/weights.safetensors", Body=want[:-1] + b"?")
    with pytest.raises(UserError, match=r"other content as unet/weights\.safetensors"):
        folders.upload(tmp_path / "model", uri)


def test_a_folder_that_changes_during_the_upload_gets_no_manifest(server: Server, tmp_path: Path, uri: str) -> None:
    write_model(tmp_path / "model", 1)
    before = manifest.hash_folder(tmp_path / "model")
    write_model(tmp_path / "model", 2)
    with pytest.raises(UserError, match=r"changed while it was uploaded: repeat the command"):
        folders.upload_with_fallback(tmp_path / "model", uri, before, None, 2)
    assert in_bucket("tests", prefix(uri)) == {}


def test_an_upload_never_deletes(server: Server, tmp_path: Path, uri: str) -> None:
    write_model(tmp_path / "model", 1)
    plain_client().put_object(Bucket="tests", Key=prefix(uri) + "/other", Body=b"other")
    folders.upload(tmp_path / "model", uri)
    assert in_bucket("tests", prefix(uri))["other"] == b"other"
    assert not [call for call in server.calls if call[0] == "DELETE" or "?delete" in call[1]]


def test_photos_need_no_manifest_and_are_downloaded_as_they_are_now(server: Server, tmp_path: Path, uri: str) -> None:
    for name, text in {"a.jpg": b"a" * 40000, "b.jpg": b"b", "sub/c.jpg": b"c"}.items():
        plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=text)
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/", Body=b"")
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}-others/x.jpg", Body=b"x")
    first = folders.download(uri, tmp_path)
    assert content(first) == {"a.jpg": b"a" * 40000, "b.jpg": b"b", "sub/c.jpg": b"c"}
    plain_client().delete_object(Bucket="tests", Key=f"{prefix(uri)}/b.jpg")
    assert set(content(folders.download(uri, tmp_path))) == {"a.jpg", "sub/c.jpg"}
    assert first.is_dir()


def test_a_single_object_is_downloaded_as_a_file(server: Server, tmp_path: Path, uri: str) -> None:
    plain_client().put_object(Bucket="tests", Key=prefix(uri) + ".txt", Body=b"words")
    found = folders.download(uri + ".txt", tmp_path)
    assert (found.name, found.read_bytes()) == (prefix(uri) + ".txt", b"words")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/x", "a\\\\..\\\\evil"])
@pytest.mark.parametrize("source", ["manifest", "key"])
def test_a_name_outside_the_folder_is_an_error(
        server: Server, tmp_path: Path, uri: str, name: str, source: str) -> None:
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name if source == 'key' else 'a'}", Body=b"evil")
    if source == "manifest":
        hostile = {name: manifest.Entry(4, (sha256(b"evil").hexdigest(),))}
        text = manifest.serialize(hostile)
        plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/{manifest.NAME}", Body=text)
    with pytest.raises(UserError, match="outside its folder"):
        folders.download(uri, tmp_path / "cache")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("entry", [
    {"size": 5, "part_size": 16, "sha256": []}, {"size": 5, "part_size": 16, "sha256": ["0" * 64] * 2},
    {"size": 5, "part_size": 0, "sha256": ["0" * 64]}, {"size": 5, "part_size": 16, "sha256": ["?"]},
    {"size": -1, "part_size": 16, "sha256": ["0" * 64]}, {"size": 10**18, "part_size": 1, "sha256": ["0" * 64]},
    {"size": 5, "part_size": 16, "sha256": [0]}, [],
])
def test_an_invalid_manifest_is_an_error(server: Server, tmp_path: Path, uri: str, entry: Any) -> None:
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/a", Body=b"12345")
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/{manifest.NAME}",
                       Body=json.dumps({"format": manifest.FORMAT, "files": {"a": entry}}).encode())
    with pytest.raises(UserError, match=r"cannot be read .*upload the folder again"):
        folders.download(uri, tmp_path)


def test_reading_json_that_is_no_object_is_an_error(server: Server, uri: str) -> None:
    for text in (b"{", b"[]"):
        plain_client().put_object(Bucket="tests", Key=prefix(uri), Body=text)
        with pytest.raises(ValueError, match=r"JSON|property name"):
            folders.read_json(uri)


@pytest.mark.parametrize("complete", [True, False])
def test_a_half_uploaded_model_is_an_error(server: Server, tmp_path: Path, uri: str, complete: bool) -> None:
    write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    gone = manifest.NAME if complete else "vae/weights.safetensors"
    plain_client().delete_object(Bucket="tests", Key=f"{prefix(uri)}/{gone}")
    with pytest.raises(UserError, match="half uploaded"):
        folders.download(uri, tmp_path / "cache", complete=complete)


def test_damaged_bytes_are_rejected(server: Server, tmp_path: Path, uri: str) -> None:
    write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    held = in_bucket("tests", prefix(uri))["vae/weights.safetensors"]
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/vae/weights.safetensors", Body=b"x" + held[1:])
    with pytest.raises(UserError, match="did not arrive correctly"):
        folders.download(uri, tmp_path / "cache")


@pytest.mark.parametrize("times", [2, 1000])
@pytest.mark.parametrize("checksum", ["MD5", "CRC32", "SHA256"])
def test_damaged_bytes_of_files_without_a_manifest_are_rejected(
        server: Server, tmp_path: Path, uri: str, checksum: str, times: int) -> None:
    config = BotoConfig(request_checksum_calculation="when_required")
    more: dict[str, Any] = {} if checksum == "MD5" else {"ChecksumAlgorithm": checksum}
    boto3.client("s3", config=config).put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"photo", **more)
    faults_left = iter(range(times))
    server.fault = lambda number, method: "damaged read" if "a.jpg" in server.calls[number][1] and \
        next(faults_left, None) is not None else None
    if times == 2:
        assert content(folders.download(uri, tmp_path)) == {"a.jpg": b"photo"}
    else:
        with pytest.raises(UserError, match=r"a\.jpg arrived damaged several times .*: repeat the command"):
            folders.download(uri, tmp_path)
        assert [path for path in tmp_path.glob("tests/*") if not path.name.startswith(".")] == []


def test_complete_folders_are_listed_by_number(server: Server, tmp_path: Path, uri: str) -> None:
    assert folders.list_complete_folders(uri) == []
    write_model(tmp_path / "model", 1)
    for step in (20, 100):
        folders.upload(tmp_path / "model", f"{uri}/step-{step}")
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/step-200/x", Body=b"half")
    assert folders.list_complete_folders(uri) == [f"{uri}/step-20", f"{uri}/step-100"]


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
    [aside] = (tmp_path / "cache/tests").glob(".writing-*")
    present = sum(min(path.stat().st_blocks * 512, path.stat().st_size) for path in aside.rglob("*") if path.is_file())
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
    [aside] = (path for path in tmp_path.glob("tests/.writing-*"))
    (aside / ".writing-0123abcd-b.jpg").write_bytes(b"pho")  # what SIGKILL leaves
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
        1, "dreambooth: s3:// and SageMaker need a package: pip install 'dreambooth[aws]'\n")


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


# -- runs --------------------------------------------------------------------------------------------------------------

def make_config(tmp_path: Path, **paths: str) -> Config:
    config = Config(storage=Storage(cache=str(tmp_path / "cache")))
    for key, value in paths.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize("words, sentence", [
    ({"upload": "runs"}, "storage.upload must be s3://BUCKET/FOLDER, or null for none, not runs"),
    ({"upload": "s3://bucket"}, "storage.upload must be"), ({"upload": "s3:///x"}, "storage.upload must be"),
    ({"checkpoints": True}, "storage.checkpoints must be false unless storage.upload is set"),
    ({"parallel": 0}, "storage.parallel must be from 1 to 64, not 0"), ({"parallel": 65}, "not 65"),
])
def test_storage_settings_are_validated(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Storage(**words)


def test_the_s3_inputs_of_a_run_are_downloaded(server: Server, tmp_path: Path, uri: str) -> None:
    write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", f"{uri}/base")
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/photos/a.jpg", Body=b"a")
    config = make_config(tmp_path, model__source=f"{uri}/base", dataset__instance_dir=f"{uri}/photos")
    found = run_inputs.fetch_inputs(config, tmp_path / "run")
    assert content(Path(found.dataset.instance_dir or "")) == {"a.jpg": b"a"}
    assert (Path(found.model.source) / "model_index.json").is_file()
    assert config.model.source.startswith("s3://"), "the caller's own config was changed"


def test_a_base_model_must_be_complete(server: Server, tmp_path: Path, uri: str) -> None:
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/base/model_index.json", Body=b"{}")
    with pytest.raises(UserError, match="half uploaded"):
        run_inputs.fetch_inputs(make_config(tmp_path, model__source=f"{uri}/base"), tmp_path / "run")


def test_a_single_file_model_needs_no_manifest(server: Server, tmp_path: Path, uri: str) -> None:
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/toy.safetensors", Body=b"weights")
    config = make_config(tmp_path, model__source=f"{uri}/toy.safetensors", model__vae=f"{uri}/toy.safetensors")
    found = run_inputs.fetch_inputs(config, tmp_path / "run").model
    assert Path(found.source).name == "toy.safetensors"
    assert Path(found.source).read_bytes() == Path(found.vae or "").read_bytes() == b"weights"



def test_a_run_is_not_resumed_with_changed_photos(server: Server, tmp_path: Path, uri: str) -> None:
    config = make_config(tmp_path, dataset__instance_dir=uri)
    run = tmp_path / "run"
    run.mkdir()
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"a")
    run_inputs.fetch_inputs(config, run)
    run_inputs.fetch_inputs(config, run)
    plain_client().put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"b")
    with pytest.raises(UserError, match=r"type checkpoint\.resume=never"):
        run_inputs.fetch_inputs(config, run)
    config.checkpoint.resume = "never"
    assert content(Path(run_inputs.fetch_inputs(config, run).dataset.instance_dir or "")) == {"a.jpg": b"b"}


def write_run(folder: Path, steps: int) -> None:
    """Write a run folder with a model, a result and a checkpoint every 100 steps."""
    write_model(folder / "model", steps)
    (folder / "result.json").write_text("{}")
    for step in range(100, steps + 1, 100):
        checkpoint_dir = folder / f"checkpoints/step-{step:06d}"
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        (checkpoint_dir / "state.json").write_text(json.dumps({"step": step, "sizes": {}}))


def test_a_result_and_checkpoints_are_uploaded_and_downloaded_again(server: Server, tmp_path: Path, uri: str) -> None:
    spec, run = Storage(upload=uri, checkpoints=True), tmp_path / "run"
    with remote_mirror.mirror_run(spec, run, "auto") as upload_result:
        write_run(run, 100)
        upload_result(SimpleNamespace(step=100))
        upload_result(SimpleNamespace(step=100))  # as when the command is repeated
    assert folders.list_complete_folders(f"{uri}/run/checkpoints") == [f"{uri}/run/checkpoints/step-000100"]
    assert "result.json" in (folders.read_manifest(f"{uri}/run/result-000100") or {})
    other = tmp_path / "elsewhere" / "run"
    with remote_mirror.mirror_run(spec, other, "auto"):
        assert json.loads((other / "checkpoints/step-000100/state.json").read_text())["step"] == 100
        assert [entry.name for entry in (other / "checkpoints").glob("step-*")] == ["step-000100"]
    with pytest.raises(UserError, match=r"type checkpoint\.resume=auto"), \
            remote_mirror.mirror_run(spec, other, "never"):
        pass


def test_a_half_uploaded_result_of_another_machine_does_not_block_the_upload(
        server: Server, tmp_path: Path, uri: str) -> None:
    """The machines have the same weights, but files that differ between machines, with times and paths."""
    for machine in ("a", "b", "c"):
        write_run(tmp_path / machine / "run", 100)
        (tmp_path / machine / "run/result.json").write_text(f'{{"seconds": "{machine}"}}')
    first, spec = f"{uri}/run/result-000100", Storage(upload=uri)
    plain_client().put_object(Bucket="tests", Key=f"{prefix(first)}/result.json", Body=b'{"seconds": "a"}')
    for machine in ("b", "b", "c"):  # the command of b is repeated; c finds a complete upload
        with remote_mirror.mirror_run(spec, tmp_path / machine / "run", "auto") as upload_result:
            upload_result(SimpleNamespace(step=100))
    assert in_bucket("tests", prefix(first)) == {"result.json": b'{"seconds": "a"}'}
    there = in_bucket("tests", f"{prefix(first)}.2")
    assert there["result.json"] == b'{"seconds": "b"}' and manifest.NAME in there
    assert in_bucket("tests", f"{prefix(first)}.3") == {}


def test_an_interrupted_upload_of_a_result_leaves_no_file_that_differs_between_machines(
        server: Server, tmp_path: Path, uri: str) -> None:
    write_run(tmp_path / "run", 100)
    server.fault = lambda number, method: "denied" if "partNumber=4" in server.calls[number][1] else None
    with pytest.raises(UserError, match="no permission"), \
            remote_mirror.mirror_run(Storage(upload=uri, parallel=1), tmp_path / "run", "auto") as upload_result:
        upload_result(SimpleNamespace(step=100))
    assert "result.json" not in in_bucket("tests", prefix(f"{uri}/run/result-000100"))


def test_a_result_with_other_weights_does_not_count_as_this_one(server: Server, tmp_path: Path, uri: str) -> None:
    write_run(tmp_path / "run", 100)
    with remote_mirror.mirror_run(Storage(upload=uri), tmp_path / "run", "auto") as upload_result:
        upload_result(SimpleNamespace(step=100))
        write_model(tmp_path / "run/model", 2)
        with pytest.raises(UserError, match="holds another complete upload"):
            upload_result(SimpleNamespace(step=100))


def test_a_half_uploaded_checkpoint_of_another_machine_does_not_block_the_upload(
        server: Server, tmp_path: Path, uri: str) -> None:
    spec, place = Storage(upload=uri, checkpoints=True), f"{uri}/run/checkpoints"
    plain_client().put_object(Bucket="tests", Key=f"{prefix(place)}/step-000100/state.json", Body=b"other")
    with remote_mirror.mirror_run(spec, tmp_path / "b/run", "auto"):
        write_run(tmp_path / "b/run", 100)
    assert folders.list_complete_folders(place) == [f"{place}/step-000100.2"]
    with remote_mirror.mirror_run(spec, tmp_path / "c/run", "auto"):
        assert [entry.name for entry in (tmp_path / "c/run/checkpoints").glob("step-*")] == ["step-000100"]
    assert len(folders.list_complete_folders(place)) == 1


def test_a_result_that_cannot_be_uploaded_is_an_error(server: Server, tmp_path: Path, uri: str) -> None:
    write_run(tmp_path / "run", 100)
    server.fault = lambda number, method: "denied" if method == "PUT" else None
    with pytest.raises(UserError, match="no permission"), \
            remote_mirror.mirror_run(Storage(upload=uri), tmp_path / "run", "auto") as upload_result:
        upload_result(SimpleNamespace(step=100))


def test_a_checkpoint_that_cannot_be_uploaded_is_only_a_warning(server: Server, tmp_path: Path, uri: str,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    with remote_mirror.mirror_run(Storage(upload=uri, checkpoints=True), tmp_path / "run", "auto"):
        write_run(tmp_path / "run", 100)
        server.fault = lambda number, method: "denied" if method == "PUT" else None
    assert "checkpoint step-000100 is not in S3" in caplog.text


def test_a_checkpoint_that_cannot_be_uploaded_is_retried_at_growing_intervals(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    now, reads, read = [1000.0], list[Path](), manifest.hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(remote_mirror, "time", SimpleNamespace(monotonic=lambda: now[0]))
    write_run(tmp_path / "run", 100)
    mirror = remote_mirror.CheckpointMirror(tmp_path / "run", uri, 2)
    server.fault = lambda number, method: "denied" if method == "PUT" else None
    tries = []
    for _ in range(1000):  # polls, POLL_SECONDS apart
        server.calls.clear()
        mirror._copy_newest()
        tries += [now[0]] if server.calls else []
        now[0] += remote_mirror.POLL_SECONDS
        if len(tries) > 14:  # too many
            break
    assert [later - sooner for sooner, later in pairwise(tries)] == [
        10, 20, 40, 80, 160, 320, 600, 600, 600, 600, 600, 600, 600]
    assert caplog.text.count("checkpoint step-000100 is not in S3") == 1
    assert len(reads) == 1, "the checkpoint was read again for each attempt"
    write_run(tmp_path / "run", 200)  # a new checkpoint is tried at once, and S3 accepts it
    server.fault = lambda number, method: None
    mirror._copy_newest()
    mirror.start()
    mirror.finish()
    assert [place.rpartition("/")[2] for place in folders.list_complete_folders(f"{uri}/checkpoints")] == [
        "step-000100", "step-000200"]


@pytest.mark.parametrize("damaged", ["step-000100", "step-000300"])
def test_a_damaged_checkpoint_does_not_hide_those_in_s3_and_is_not_uploaded(
        server: Server, tmp_path: Path, uri: str, damaged: str) -> None:
    spec = Storage(upload=uri, checkpoints=True)
    with remote_mirror.mirror_run(spec, tmp_path / "a/run", "auto"):
        write_run(tmp_path / "a/run", 100)
    broken = tmp_path / "b/run/checkpoints" / damaged
    broken.mkdir(parents=True)
    (broken / "trained.safetensors").write_bytes(b"half")
    with remote_mirror.mirror_run(spec, tmp_path / "b/run", "auto"):
        assert checkpoint_files.latest(broken.parent) == broken.parent / "step-000100"
    assert folders.list_complete_folders(f"{uri}/run/checkpoints") == [f"{uri}/run/checkpoints/step-000100"]


@pytest.mark.slow
def test_a_run_from_s3_to_s3_is_resumed_on_another_machine(running: Server, tmp_path: Path) -> None:
    assets = Path(folders.__file__).parents[1] / "assets"
    folders.upload(assets / "tiny-sd", "s3://tests/whole/base")
    for photo in (assets / "demo").iterdir():
        plain_client().upload_file(str(photo), "tests", f"whole/photos/{photo.name}")
    command = [PYTHON, "-m", "dreambooth.train", *FAST, "model.source=s3://tests/whole/base", "dataset=s3",
               "dataset.instance_dir=s3://tests/whole/photos", "dataset.instance_prompt=a photo of a zwx toy",
               "dataset.class_prompt=a photo of a toy", "storage.upload=s3://tests/whole/runs",
               "storage.checkpoints=true"]

    def train(machine: str, *more: str) -> str:
        done = subprocess.run([*command, f"run_root={tmp_path / machine}", *more], capture_output=True, text=True,
                              check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    train("one", "train.max_train_steps=2")
    assert "going on after step 2" in train("two", "train.max_train_steps=4")
    [name] = {key.split("/")[0] for key in in_bucket("tests", "whole/runs")}
    assert folders.read_manifest(f"s3://tests/whole/runs/{name}/result-000004")
    generated = subprocess.run(
        [PYTHON, "-m", "dreambooth.generate", f"run=s3://tests/whole/runs/{name}/result-000004", "num_images=1",
         "num_inference_steps=2", f"out={tmp_path / 'out'}"], check=False, cwd=tmp_path)
    assert generated.returncode == 0
