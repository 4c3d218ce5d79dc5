"""S3 folders, against a local server: content is equal, nothing is half there or lost."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config as BotoConfig

from dreambooth.errors import UserError
from dreambooth.storage import folders, manifest
from tests.storage.bucket_content import content, prefix, put_paths
from tests.support.s3_server import (
    Server,
    in_bucket,
    plain_client,
    write_model,
)


def test_a_folder_is_equal_after_upload_and_download(server: Server, tmp_path: Path, uri: str) -> None:
    want = write_model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    assert {name: text for name, text in in_bucket("tests", prefix(uri)).items() if name != manifest.NAME} == want
    downloaded = folders.download(uri, tmp_path / "cache", complete=True)
    assert content(downloaded) == want
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
    downloaded = folders.download(uri + ".txt", tmp_path)
    assert (downloaded.name, downloaded.read_bytes()) == (prefix(uri) + ".txt", b"words")


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
    missing = manifest.NAME if complete else "vae/weights.safetensors"
    plain_client().delete_object(Bucket="tests", Key=f"{prefix(uri)}/{missing}")
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
