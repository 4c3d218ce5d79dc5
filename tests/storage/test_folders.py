"""Folders in S3, against a local server: bytes equal, nothing half, nothing lost, one sentence when it fails."""

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
from dreambooth.runs import remote_mirror
from dreambooth.storage import __main__ as storage_command
from dreambooth.storage import download, folders, manifest, run_inputs, s3_bucket
from dreambooth.training import checkpoint
from dreambooth.utils import atomic_files
from tests.support.faults import FAST
from tests.support.s3_server import CHILD, KINDS, PART, Server, in_bucket, model, plain, serving, trial


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving() as server:
        plain().create_bucket(Bucket="tests")
        plain().create_bucket(Bucket="faults")
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(s3_bucket, "PAUSE", 0.01)
    monkeypatch.setattr(manifest, "PART", PART)
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


def sent(server: Server) -> list[str]:
    """What was written: object names, with the number of the part."""
    return [path for method, path in server.calls if method == "PUT"]


def test_a_folder_goes_up_and_comes_down_equal(server: Server, tmp_path: Path, uri: str) -> None:
    want = model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    assert {name: text for name, text in in_bucket("tests", prefix(uri)).items() if name != manifest.NAME} == want
    found = folders.download(uri, tmp_path / "cache", complete=True)
    assert content(found) == want
    assert sent(server)[-1].endswith(manifest.NAME), "the manifest is not last"


def test_what_is_there_is_not_sent_or_fetched_again(server: Server, tmp_path: Path, uri: str) -> None:
    model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    folders.download(uri, tmp_path / "cache")
    before = len(sent(server))
    folders.upload(tmp_path / "model", uri)
    assert [path for path in sent(server)[before:] if not path.endswith(manifest.NAME)] == []
    reads = len(server.calls)
    folders.download(uri, tmp_path / "cache")
    assert [path for method, path in server.calls[reads:] if method == "GET" and ".safetensors" in path] == []


def test_an_interrupted_upload_goes_on_with_its_parts(server: Server, tmp_path: Path, uri: str) -> None:
    want = model(tmp_path / "model", 1)
    server.fault = lambda number, method: "denied" if "partNumber=4" in server.calls[number][1] else None
    with pytest.raises(UserError, match="no permission for s3:PutObject"):
        folders.upload(tmp_path / "model", uri, parallel=1)
    assert manifest.NAME not in in_bucket("tests", prefix(uri))
    server.fault = lambda number, method: None
    server.calls.clear()
    folders.upload(tmp_path / "model", uri)
    parts = [path for path in sent(server) if "unet/weights" in path]
    assert parts
    assert all("partNumber=1" not in path for path in parts), "a part that S3 has was sent again"
    assert content(folders.download(uri, tmp_path / "cache")) == want


def test_an_interrupted_download_goes_on_with_its_parts(server: Server, tmp_path: Path, uri: str) -> None:
    want = model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    server.calls.clear()
    seen: list[int] = []

    def cut(number: int, method: str) -> str | None:
        seen.append(number)
        return "denied" if len(seen) > 6 else None

    server.fault = cut
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
    want = model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    model(tmp_path / "model", 2)
    with pytest.raises(UserError, match="type another place"):
        folders.upload(tmp_path / "model", uri)
    assert content(folders.download(uri, tmp_path / "cache")) == want


@pytest.mark.parametrize("name", ["model_index.json", "unet/weights.safetensors"])
def test_somebody_elses_object_is_never_replaced(server: Server, tmp_path: Path, uri: str, name: str) -> None:
    model(tmp_path / "model", 1)
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=b"theirs")
    server.calls.clear()
    with pytest.raises(UserError, match=f"something else as {name}"):
        folders.upload(tmp_path / "model", uri)
    assert in_bucket("tests", prefix(uri)) == {name: b"theirs"}
    assert [method for method, _ in server.calls if method != "GET" and method != "HEAD"] == [], "bytes were sent"


@pytest.mark.parametrize("name", ["model_index.json", "unet/weights.safetensors"])
def test_somebody_elses_object_that_comes_meanwhile_is_not_replaced(
        server: Server, tmp_path: Path, uri: str, name: str) -> None:
    model(tmp_path / "model", 1)
    came: list[str] = []

    def comes(number: int, method: str) -> None:
        path = server.calls[number][1]
        if method in ("PUT", "POST") and f"/{name}" in path and not came:
            came.append(path)
            plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=b"theirs")

    server.fault = comes
    with pytest.raises(UserError, match=f"something else as {name}"):
        folders.upload(tmp_path / "model", uri)
    held = in_bucket("tests", prefix(uri))
    assert held[name] == b"theirs"
    assert manifest.NAME not in held


def test_what_another_tool_copied_gets_a_manifest(server: Server, tmp_path: Path, uri: str) -> None:
    want = model(tmp_path / "model", 1)
    for name, text in want.items():
        plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=text)
    server.calls.clear()
    folders.upload(tmp_path / "model", uri)
    assert sent(server) == [f"/tests/{prefix(uri)}/{manifest.NAME}"]
    reads = [path for method, path in server.calls if method == "GET" and "unet/weights" in path]
    assert len(reads) == 6, "what was read is read again"
    assert content(folders.download(uri, tmp_path / "cache", complete=True)) == want


def test_what_another_tool_copied_otherwise_is_refused(server: Server, tmp_path: Path, uri: str) -> None:
    want = model(tmp_path / "model", 1)["unet/weights.safetensors"]
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/unet/weights.safetensors", Body=want[:-1] + b"?")
    with pytest.raises(UserError, match=r"something else as unet/weights\.safetensors"):
        folders.upload(tmp_path / "model", uri)


def test_a_file_that_changes_while_it_is_sent_is_not_completed(server: Server, tmp_path: Path, uri: str) -> None:
    model(tmp_path / "model", 1)
    before = manifest.of_folder(tmp_path / "model")
    model(tmp_path / "model", 2)
    with pytest.raises(UserError, match=r"has changed while it was sent: repeat the command"):
        folders.upload_beside(tmp_path / "model", uri, before, None, 2)
    assert in_bucket("tests", prefix(uri)) == {}


def test_an_upload_never_deletes(server: Server, tmp_path: Path, uri: str) -> None:
    model(tmp_path / "model", 1)
    plain().put_object(Bucket="tests", Key=prefix(uri) + "/other", Body=b"theirs")
    folders.upload(tmp_path / "model", uri)
    assert in_bucket("tests", prefix(uri))["other"] == b"theirs"
    assert not [call for call in server.calls if call[0] == "DELETE" or "?delete" in call[1]]


def test_photos_need_no_manifest_and_follow_the_bucket(server: Server, tmp_path: Path, uri: str) -> None:
    for name, text in {"a.jpg": b"a" * 40000, "b.jpg": b"b", "sub/c.jpg": b"c"}.items():
        plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=text)
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/", Body=b"")
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}-others/x.jpg", Body=b"x")
    first = folders.download(uri, tmp_path)
    assert content(first) == {"a.jpg": b"a" * 40000, "b.jpg": b"b", "sub/c.jpg": b"c"}
    plain().delete_object(Bucket="tests", Key=f"{prefix(uri)}/b.jpg")
    assert set(content(folders.download(uri, tmp_path))) == {"a.jpg", "sub/c.jpg"}
    assert first.is_dir()


def test_a_single_object_is_a_file(server: Server, tmp_path: Path, uri: str) -> None:
    plain().put_object(Bucket="tests", Key=prefix(uri) + ".txt", Body=b"words")
    found = folders.download(uri + ".txt", tmp_path)
    assert (found.name, found.read_bytes()) == (prefix(uri) + ".txt", b"words")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/x", "a\\\\..\\\\evil"])
@pytest.mark.parametrize("said_by", ["manifest", "key"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
        server: Server, tmp_path: Path, uri: str, name: str, said_by: str) -> None:
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name if said_by == 'key' else 'a'}", Body=b"evil")
    if said_by == "manifest":
        hostile = {name: manifest.Entry(4, (sha256(b"evil").hexdigest(),))}
        plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/{manifest.NAME}", Body=manifest.dumped(hostile))
    with pytest.raises(UserError, match="leads out of its folder"):
        folders.download(uri, tmp_path / "cache")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("told", [
    {"size": 5, "part_size": 16, "sha256": []}, {"size": 5, "part_size": 16, "sha256": ["0" * 64] * 2},
    {"size": 5, "part_size": 0, "sha256": ["0" * 64]}, {"size": 5, "part_size": 16, "sha256": ["?"]},
    {"size": -1, "part_size": 16, "sha256": ["0" * 64]}, {"size": 10**18, "part_size": 1, "sha256": ["0" * 64]},
    {"size": 5, "part_size": 16, "sha256": [0]}, [],
])
def test_a_manifest_that_cannot_be_right_is_refused(server: Server, tmp_path: Path, uri: str, told: Any) -> None:
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/a", Body=b"12345")
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/{manifest.NAME}",
                       Body=json.dumps({"format": manifest.FORMAT, "files": {"a": told}}).encode())
    with pytest.raises(UserError, match=r"cannot be read .*upload the folder again"):
        folders.download(uri, tmp_path)


def test_json_that_is_none_is_said_to_be_so(server: Server, uri: str) -> None:
    for text in (b"{", b"[]"):
        plain().put_object(Bucket="tests", Key=prefix(uri), Body=text)
        with pytest.raises(ValueError, match=r"JSON|property name"):
            folders.read_json(uri)


@pytest.mark.parametrize("complete", [True, False])
def test_a_half_uploaded_model_is_said_to_be_so(server: Server, tmp_path: Path, uri: str, complete: bool) -> None:
    model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    gone = manifest.NAME if complete else "vae/weights.safetensors"
    plain().delete_object(Bucket="tests", Key=f"{prefix(uri)}/{gone}")
    with pytest.raises(UserError, match="half uploaded"):
        folders.download(uri, tmp_path / "cache", complete=complete)


def test_damaged_bytes_are_not_taken(server: Server, tmp_path: Path, uri: str) -> None:
    model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    held = in_bucket("tests", prefix(uri))["vae/weights.safetensors"]
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/vae/weights.safetensors", Body=b"x" + held[1:])
    with pytest.raises(UserError, match="did not arrive right"):
        folders.download(uri, tmp_path / "cache")


@pytest.mark.parametrize("times", [2, 1000])
@pytest.mark.parametrize("kept", ["MD5", "CRC32", "SHA256"])
def test_damaged_bytes_of_what_has_no_manifest_are_not_taken(
        server: Server, tmp_path: Path, uri: str, kept: str, times: int) -> None:
    config = BotoConfig(request_checksum_calculation="when_required")
    more: dict[str, Any] = {} if kept == "MD5" else {"ChecksumAlgorithm": kept}
    boto3.client("s3", config=config).put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"photo", **more)
    left = iter(range(times))
    server.fault = lambda number, method: "damaged read" if "a.jpg" in server.calls[number][1] and \
        next(left, None) is not None else None
    if times == 2:
        assert content(folders.download(uri, tmp_path)) == {"a.jpg": b"photo"}
    else:
        with pytest.raises(UserError, match=r"a\.jpg arrived damaged several times .*: repeat the command"):
            folders.download(uri, tmp_path)
        assert [path for path in tmp_path.glob("tests/*") if not path.name.startswith(".")] == []


def test_complete_folders_are_listed_by_number(server: Server, tmp_path: Path, uri: str) -> None:
    assert folders.complete_folders(uri) == []
    model(tmp_path / "model", 1)
    for step in (20, 100):
        folders.upload(tmp_path / "model", f"{uri}/step-{step}")
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/step-200/x", Body=b"half")
    assert folders.complete_folders(uri) == [f"{uri}/step-20", f"{uri}/step-100"]


# -- errors -----------------------------------------------------------------------------------------------------------

def test_no_credentials(server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"no AWS credentials.*type aws configure"):
        folders.download(uri, tmp_path)


def test_no_bucket(server: Server, tmp_path: Path) -> None:
    model(tmp_path / "model", 1)
    with pytest.raises(UserError, match="no bucket not-there"):
        folders.download("s3://not-there/x", tmp_path)
    with pytest.raises(UserError, match="no bucket not-there"):
        folders.upload(tmp_path / "model", "s3://not-there/x")


def test_nothing_there(server: Server, tmp_path: Path, uri: str) -> None:
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


def test_no_place() -> None:
    for text in ("s3://", "s3://bucket", "photos", "s3://bucket//"):
        with pytest.raises(UserError, match="type s3://BUCKET/FOLDER"):
            s3_bucket.Place.of(text)


def test_a_full_disk_is_said_before_anything_is_fetched(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    usage = download.shutil.disk_usage(".")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DoesNotFit, match=r"storage\.cache=DIR"):
        folders.download(uri, tmp_path / "cache")


def test_a_stopped_download_fits_on_the_disk_that_holds_half_of_it(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    server.calls.clear()
    server.fault = lambda number, method: "denied" if number > 6 else None
    with pytest.raises(UserError, match="no permission"):
        folders.download(uri, tmp_path / "cache", parallel=1)
    server.fault = lambda number, method: None
    [aside] = (tmp_path / "cache/tests").glob(".writing-*")
    half = sum(min(path.stat().st_blocks * 512, path.stat().st_size) for path in aside.rglob("*") if path.is_file())
    assert half >= PART
    usage = download.shutil.disk_usage(".")
    free = sum(map(len, want.values())) - half
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=free - 1))
    with pytest.raises(DoesNotFit):
        folders.download(uri, tmp_path / "cache")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=free))
    assert content(folders.download(uri, tmp_path / "cache")) == want


@pytest.mark.parametrize("made_by", ["upload", "another tool"])
def test_a_disk_that_is_full_meanwhile_is_a_sentence(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, made_by: str) -> None:
    def full(*words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", uri)
    if made_by == "another tool":
        plain().delete_object(Bucket="tests", Key=f"{prefix(uri)}/{manifest.NAME}")
    with monkeypatch.context() as patched, pytest.raises(DoesNotFit, match=r"disk of .* is full: free some space"):
        patched.setattr(os, "pwrite", full)
        patched.setattr(atomic_files, "sync", full)
        folders.download(uri, tmp_path / "cache")
    assert content(folders.download(uri, tmp_path / "cache"))


def test_what_a_killed_download_was_writing_is_not_in_the_folder(server: Server, tmp_path: Path, uri: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/{name}", Body=b"photo")
    server.fault = lambda number, method: "denied" if "b.jpg" in server.calls[number][1] else None
    with pytest.raises(UserError, match="no permission"):
        folders.download(uri, tmp_path)
    server.fault = lambda number, method: None
    [aside] = (path for path in tmp_path.glob("tests/.writing-*"))
    (aside / ".writing-0123abcd-b.jpg").write_bytes(b"pho")  # what SIGKILL leaves
    assert content(folders.download(uri, tmp_path)) == {"a.jpg": b"photo", "b.jpg": b"photo"}


def test_a_cache_that_cannot_be_written_is_a_sentence(server: Server, tmp_path: Path, uri: str) -> None:
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"photo")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*type storage\.cache=DIR"):
        folders.download(uri, tmp_path / "file")


def test_what_is_not_there_is_not_for_whom_may_not_list(server: Server, tmp_path: Path, uri: str) -> None:
    """AWS answers 403 about an object that is not there to who has no s3:ListBucket."""
    model(tmp_path / "model", 1)
    server.fault = lambda number, method: "denied" if method != "PUT" else None
    with pytest.raises(UserError, match=r"s3:GetObject on .* or it is not there and there is none for s3:ListBucket"):
        folders.upload(tmp_path / "model", uri)


@pytest.mark.parametrize("parallel", ["0", "65"])
def test_the_number_of_transfers_is_checked(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], parallel: str) -> None:
    monkeypatch.setattr(cli, "_codes", [])
    monkeypatch.setattr(sys, "argv", ["storage", "upload", str(tmp_path), "s3://b/x", "--parallel", parallel])
    with pytest.raises(SystemExit, match="1"):
        storage_command.main()
    assert capsys.readouterr().err == f"dreambooth: --parallel must be from 1 to 64, not {parallel}\n"


def test_a_bug_keeps_its_traceback(server: Server, uri: str) -> None:
    def bug() -> None:
        raise AssertionError

    with pytest.raises(AssertionError):
        s3_bucket.calling(bug, "s3:GetObject", uri)


def test_without_boto3_it_says_what_to_install(tmp_path: Path) -> None:
    code = ("import sys; sys.modules['boto3'] = None; sys.argv = ['storage', 'download', 's3://b/x', '.']; "
            "from dreambooth.storage.__main__ import main; main()")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ran.returncode, ran.stderr) == (
        1, "dreambooth: s3:// and SageMaker need a package: pip install 'dreambooth[aws]'\n")


# -- faults -----------------------------------------------------------------------------------------------------------

TWENTY = [(KINDS[seed % len(KINDS)], 100 + seed) for seed in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, seed", TWENTY)
def test_under_faults_nothing_is_half_and_nothing_is_lost(
        running: Server, tmp_path: Path, kind: str, seed: int) -> None:
    """One of 20; `make proof` does 100."""
    codes = trial(running, tmp_path, kind, seed)
    if kind == "killed":
        assert -9 in codes


@pytest.mark.slow
def test_200_mb_up_and_down(running: Server, tmp_path: Path) -> None:
    """With the product's own part size."""
    (tmp_path / "model").mkdir()
    with (tmp_path / "model/weights.safetensors").open("wb") as file:
        for _ in range(190):
            file.write(os.urandom(2**20))
    (tmp_path / "model/small.safetensors").write_bytes(os.urandom(10 * 2**20))
    for words in (["upload", str(tmp_path / "model"), "s3://tests/large"],
                  ["download", "s3://tests/large", str(tmp_path / "cache")]):
        code = CHILD.format(part=2**24, timeout=folders.TIMEOUT)
        assert subprocess.run([sys.executable, "-c", code, *words], check=False).returncode == 0
    [made] = [path for path in (tmp_path / "cache/tests").iterdir() if not path.name.startswith(".")]
    for name in ("weights.safetensors", "small.safetensors"):
        assert subprocess.run(["cmp", tmp_path / "model" / name, made / name], check=False).returncode == 0


def test_the_server_of_these_tests_refuses_a_wrong_checksum(server: Server) -> None:
    from botocore.exceptions import ClientError

    wrong: dict[str, Any] = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": "A" * 43 + "="}
    with pytest.raises(ClientError, match="BadDigest"):
        plain().put_object(Bucket="tests", Key="wrong", Body=b"x", **wrong)


# -- in a run ---------------------------------------------------------------------------------------------------------

def composed(tmp_path: Path, **paths: str) -> Config:
    config = Config(storage=Storage(cache=str(tmp_path / "cache")))
    for key, value in paths.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize("words, sentence", [
    ({"upload": "runs"}, "storage.upload must be s3://BUCKET/FOLDER, or null for none, not runs"),
    ({"upload": "s3://bucket"}, "storage.upload must be"), ({"upload": "s3:///x"}, "storage.upload must be"),
    ({"checkpoints": True}, "storage.checkpoints must be false unless storage.upload says where"),
    ({"parallel": 0}, "storage.parallel must be from 1 to 64, not 0"), ({"parallel": 65}, "not 65"),
])
def test_settings_of_storage_are_checked(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Storage(**words)


def test_what_a_run_reads_from_s3_is_fetched(server: Server, tmp_path: Path, uri: str) -> None:
    model(tmp_path / "model", 1)
    folders.upload(tmp_path / "model", f"{uri}/base")
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/photos/a.jpg", Body=b"a")
    config = composed(tmp_path, model__source=f"{uri}/base", dataset__instance_dir=f"{uri}/photos")
    found = run_inputs.fetched(config, tmp_path / "run")
    assert content(Path(found.dataset.instance_dir or "")) == {"a.jpg": b"a"}
    assert (Path(found.model.source) / "model_index.json").is_file()
    assert config.model.source.startswith("s3://"), "the caller's own config was changed"


def test_a_base_model_must_be_complete(server: Server, tmp_path: Path, uri: str) -> None:
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/base/model_index.json", Body=b"{}")
    with pytest.raises(UserError, match="half uploaded"):
        run_inputs.fetched(composed(tmp_path, model__source=f"{uri}/base"), tmp_path / "run")


def test_a_model_in_one_file_needs_no_manifest(server: Server, tmp_path: Path, uri: str) -> None:
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/toy.safetensors", Body=b"weights")
    config = composed(tmp_path, model__source=f"{uri}/toy.safetensors", model__vae=f"{uri}/toy.safetensors")
    found = run_inputs.fetched(config, tmp_path / "run").model
    assert Path(found.source).name == "toy.safetensors"
    assert Path(found.source).read_bytes() == Path(found.vae or "").read_bytes() == b"weights"



def test_photos_that_changed_are_not_taken_for_the_same_run(server: Server, tmp_path: Path, uri: str) -> None:
    config = composed(tmp_path, dataset__instance_dir=uri)
    run = tmp_path / "run"
    run.mkdir()
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"a")
    run_inputs.fetched(config, run)
    run_inputs.fetched(config, run)
    plain().put_object(Bucket="tests", Key=f"{prefix(uri)}/a.jpg", Body=b"b")
    with pytest.raises(UserError, match=r"type checkpoint\.resume=never"):
        run_inputs.fetched(config, run)
    config.checkpoint.resume = "never"
    assert content(Path(run_inputs.fetched(config, run).dataset.instance_dir or "")) == {"a.jpg": b"b"}


def made_run(folder: Path, steps: int) -> None:
    model(folder / "model", steps)
    (folder / "result.json").write_text("{}")
    for step in range(100, steps + 1, 100):
        kept = folder / f"checkpoints/step-{step:06d}"
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "state.json").write_text(json.dumps({"step": step, "sizes": {}}))


def test_a_result_and_checkpoints_are_copied_and_brought_back(server: Server, tmp_path: Path, uri: str) -> None:
    spec, run = Storage(upload=uri, checkpoints=True), tmp_path / "run"
    with remote_mirror.kept(spec, run, "auto") as keep:
        made_run(run, 100)
        keep(SimpleNamespace(step=100))
        keep(SimpleNamespace(step=100))  # the command, repeated
    assert folders.complete_folders(f"{uri}/run/checkpoints") == [f"{uri}/run/checkpoints/step-000100"]
    assert "result.json" in (folders.complete(f"{uri}/run/result-000100") or {})
    other = tmp_path / "elsewhere" / "run"
    with remote_mirror.kept(spec, other, "auto"):
        assert json.loads((other / "checkpoints/step-000100/state.json").read_text())["step"] == 100
        assert [entry.name for entry in (other / "checkpoints").glob("step-*")] == ["step-000100"]
    with pytest.raises(UserError, match=r"type checkpoint\.resume=auto"), remote_mirror.kept(spec, other, "never"):
        pass


def test_a_result_that_another_machine_left_half_there_is_in_nobodys_way(
        server: Server, tmp_path: Path, uri: str) -> None:
    """Both machines have the same weights, and what differs from machine to machine: times, folders."""
    for machine in ("a", "b", "c"):
        made_run(tmp_path / machine / "run", 100)
        (tmp_path / machine / "run/result.json").write_text(f'{{"seconds": "{machine}"}}')
    first, spec = f"{uri}/run/result-000100", Storage(upload=uri)
    plain().put_object(Bucket="tests", Key=f"{prefix(first)}/result.json", Body=b'{"seconds": "a"}')
    for machine in ("b", "b", "c"):  # b's command is repeated; c finds it complete
        with remote_mirror.kept(spec, tmp_path / machine / "run", "auto") as keep:
            keep(SimpleNamespace(step=100))
    assert in_bucket("tests", prefix(first)) == {"result.json": b'{"seconds": "a"}'}
    there = in_bucket("tests", f"{prefix(first)}.2")
    assert there["result.json"] == b'{"seconds": "b"}' and manifest.NAME in there
    assert in_bucket("tests", f"{prefix(first)}.3") == {}


def test_a_result_that_was_stopped_left_nothing_of_this_machine(server: Server, tmp_path: Path, uri: str) -> None:
    made_run(tmp_path / "run", 100)
    server.fault = lambda number, method: "denied" if "partNumber=4" in server.calls[number][1] else None
    with pytest.raises(UserError, match="no permission"), \
            remote_mirror.kept(Storage(upload=uri, parallel=1), tmp_path / "run", "auto") as keep:
        keep(SimpleNamespace(step=100))
    assert "result.json" not in in_bucket("tests", prefix(f"{uri}/run/result-000100"))


def test_a_result_of_other_weights_is_not_taken_for_this_one(server: Server, tmp_path: Path, uri: str) -> None:
    made_run(tmp_path / "run", 100)
    with remote_mirror.kept(Storage(upload=uri), tmp_path / "run", "auto") as keep:
        keep(SimpleNamespace(step=100))
        model(tmp_path / "run/model", 2)
        with pytest.raises(UserError, match="holds another complete upload"):
            keep(SimpleNamespace(step=100))


def test_a_checkpoint_that_another_machine_left_half_there_is_in_nobodys_way(
        server: Server, tmp_path: Path, uri: str) -> None:
    spec, place = Storage(upload=uri, checkpoints=True), f"{uri}/run/checkpoints"
    plain().put_object(Bucket="tests", Key=f"{prefix(place)}/step-000100/state.json", Body=b"theirs")
    with remote_mirror.kept(spec, tmp_path / "b/run", "auto"):
        made_run(tmp_path / "b/run", 100)
    assert folders.complete_folders(place) == [f"{place}/step-000100.2"]
    with remote_mirror.kept(spec, tmp_path / "c/run", "auto"):
        assert [entry.name for entry in (tmp_path / "c/run/checkpoints").glob("step-*")] == ["step-000100"]
    assert len(folders.complete_folders(place)) == 1


def test_a_result_that_cannot_be_copied_is_an_error(server: Server, tmp_path: Path, uri: str) -> None:
    made_run(tmp_path / "run", 100)
    server.fault = lambda number, method: "denied" if method == "PUT" else None
    with pytest.raises(UserError, match="no permission"), \
            remote_mirror.kept(Storage(upload=uri), tmp_path / "run", "auto") as keep:
        keep(SimpleNamespace(step=100))


def test_a_checkpoint_that_cannot_be_copied_stops_nothing(server: Server, tmp_path: Path, uri: str,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    with remote_mirror.kept(Storage(upload=uri, checkpoints=True), tmp_path / "run", "auto"):
        made_run(tmp_path / "run", 100)
        server.fault = lambda number, method: "denied" if method == "PUT" else None
    assert "checkpoint step-000100 is not in S3" in caplog.text


def test_a_checkpoint_that_cannot_be_copied_is_tried_ever_more_seldom(
        server: Server, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    now, reads, read = [1000.0], list[Path](), manifest.of_file
    monkeypatch.setattr(manifest, "of_file", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(remote_mirror, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made_run(tmp_path / "run", 100)
    mirror = remote_mirror.Mirror(tmp_path / "run", uri, 2)
    server.fault = lambda number, method: "denied" if method == "PUT" else None
    tries = []
    for _ in range(1000):  # looks, LOOK seconds apart
        server.calls.clear()
        mirror._turn()
        tries += [now[0]] if server.calls else []
        now[0] += remote_mirror.LOOK
        if len(tries) > 14:  # too many already
            break
    assert [later - sooner for sooner, later in pairwise(tries)] == [
        10, 20, 40, 80, 160, 320, 600, 600, 600, 600, 600, 600, 600]
    assert caplog.text.count("checkpoint step-000100 is not in S3") == 1
    assert len(reads) == 1, "a checkpoint was read again for each attempt"
    made_run(tmp_path / "run", 200)  # a new one is tried at once, and S3 takes it again
    server.fault = lambda number, method: None
    mirror._turn()
    mirror.start()
    mirror.finish()
    assert [place.rpartition("/")[2] for place in folders.complete_folders(f"{uri}/checkpoints")] == [
        "step-000100", "step-000200"]


@pytest.mark.parametrize("damaged", ["step-000100", "step-000300"])
def test_a_damaged_checkpoint_hides_none_in_s3_and_is_not_copied(
        server: Server, tmp_path: Path, uri: str, damaged: str) -> None:
    spec = Storage(upload=uri, checkpoints=True)
    with remote_mirror.kept(spec, tmp_path / "a/run", "auto"):
        made_run(tmp_path / "a/run", 100)
    half = tmp_path / "b/run/checkpoints" / damaged
    half.mkdir(parents=True)
    (half / "trained.safetensors").write_bytes(b"half")
    with remote_mirror.kept(spec, tmp_path / "b/run", "auto"):
        assert checkpoint.latest(half.parent) == half.parent / "step-000100"
    assert folders.complete_folders(f"{uri}/run/checkpoints") == [f"{uri}/run/checkpoints/step-000100"]


@pytest.mark.slow
def test_a_whole_run_from_s3_to_s3_goes_on_on_another_machine(running: Server, tmp_path: Path) -> None:
    assets = Path(folders.__file__).parents[1] / "assets"
    folders.upload(assets / "tiny-sd", "s3://tests/whole/base")
    for photo in (assets / "demo").iterdir():
        plain().upload_file(str(photo), "tests", f"whole/photos/{photo.name}")
    command = [sys.executable, "-m", "dreambooth.train", *FAST, "model.source=s3://tests/whole/base", "dataset=s3",
               "dataset.instance_dir=s3://tests/whole/photos", "dataset.instance_prompt=a photo of a zwx toy",
               "dataset.class_prompt=a photo of a toy", "storage.upload=s3://tests/whole/runs",
               "storage.checkpoints=true"]

    def ran(machine: str, *more: str) -> str:
        done = subprocess.run([*command, f"run_root={tmp_path / machine}", *more], capture_output=True, text=True,
                              check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ran("one", "train.max_train_steps=2")
    assert "going on after step 2" in ran("two", "train.max_train_steps=4")
    [name] = {key.split("/")[0] for key in in_bucket("tests", "whole/runs")}
    assert folders.complete(f"s3://tests/whole/runs/{name}/result-000004")
    drawn = subprocess.run(
        [sys.executable, "-m", "dreambooth.generate", f"run=s3://tests/whole/runs/{name}/result-000004", "num_images=1",
         "num_inference_steps=2", f"out={tmp_path / 'out'}"], check=False, cwd=tmp_path)
    assert drawn.returncode == 0
