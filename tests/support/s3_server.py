"""A local S3 server for tests, with faults on request, and a trial of one upload and download under a fault.

It is moto with two behaviours of AWS that moto lacks: a body that differs from its checksum is rejected, and so is the
completion of a multipart upload if the object exists already.
"""

import base64
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from tests.support.warm_python import PYTHON

os.environ["MOTO_S3_CUSTOM_ENDPOINTS"] = ""
os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "1"  # of moto; AWS requires 5 MiB, and the package uses larger parts

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
FAULTS = ("500", "reset before", "reset after", "short write", "short read", "damaged read", "slow", "denied", "killed")
PART_SIZE = 2**14  # bytes of a part in the command under test
COMMAND = ("import sys; from dreambooth.storage import __main__, folders, manifest, s3_bucket;"
           "manifest.PART_SIZE = {part_size}; s3_bucket.PAUSE = 0.01; folders.READ_TIMEOUT = {timeout};"
           "__main__.main()")  # with a small part size and short waits
READ_TIMEOUT, SLOW = 1.0, 1.5  # seconds that the command waits; seconds that a slow response takes
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
Fault = Callable[[int, str], str | None]  # number of the request, method -> kind of fault, or None


class Server:
    """An S3 server on a free port of this machine."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *args: Any) -> None:
                pass

        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.fault: Fault = lambda number, method: None
        self.calls: list[tuple[str, str]] = []  # method and path with query
        self._lock = threading.Lock()
        self._parts: dict[tuple[str, str], str] = {}  # (upload, number) -> checksum, which moto does not store
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        with self._lock:
            number = len(self.calls)
            query = environ.get("QUERY_STRING", "")
            self.calls.append((environ["REQUEST_METHOD"], environ["PATH_INFO"] + ("?" + query if query else "")))
        kind = self.fault(number, environ["REQUEST_METHOD"])
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if kind == "short write":
            body = body[:len(body) // 2]
        if kind == "500":
            return _error(start, "500 Internal Server Error", "InternalError")
        if kind == "denied":
            return _error(start, "403 Forbidden", "AccessDenied")
        if kind == "elsewhere":
            return _error(start, "301 Moved Permanently", "PermanentRedirect")
        if kind == "reset before":
            return _reset(environ)
        if kind == "slow":
            time.sleep(SLOW)
        if (checksum := environ.get("HTTP_X_AMZ_CHECKSUM_SHA256")) and environ["REQUEST_METHOD"] == "PUT":
            if base64.b64encode(hashlib.sha256(body).digest()).decode() != checksum:
                return _error(start, "400 Bad Request", "BadDigest")
            if part := re.search(r"partNumber=(\d+)", environ.get("QUERY_STRING", "")):
                self._parts[re.sub(r"&?partNumber=\d+&?", "", environ["QUERY_STRING"]), part[1]] = checksum
        if environ["REQUEST_METHOD"] == "POST" and "HTTP_IF_NONE_MATCH" in environ and self._object_exists(environ):
            return _error(start, "412 Precondition Failed", "PreconditionFailed")
        try:
            request = {**environ, "wsgi.input": BytesIO(body), "CONTENT_LENGTH": str(len(body))}
            response = self._forward(request, start, kind)
        except KeyError:  # raised by moto for a part that arrives after its upload was completed
            return _error(start, "404 Not Found", "NoSuchUpload")
        return _reset(environ) if kind == "reset after" else response

    def _object_exists(self, environ: dict[str, Any]) -> bool:
        statuses: list[str] = []
        head = environ | {"REQUEST_METHOD": "HEAD", "QUERY_STRING": "", "wsgi.input": BytesIO(), "CONTENT_LENGTH": "0"}
        del head["HTTP_IF_NONE_MATCH"]
        list(self._moto(head, lambda status, headers, info=None: statuses.append(status)))
        return statuses[0].startswith("200")

    def _forward(self, environ: dict[str, Any], start: Any, kind: str | None) -> Any:
        """Let moto answer a request, add the checksums of parts to a list of parts, and apply a fault of reading."""
        responses: list[Any] = []
        text = b"".join(self._moto(environ, lambda status, headers, info=None: responses.append((status, headers))))
        status, headers = responses[0]
        if "uploadId=" in environ["QUERY_STRING"] and environ["REQUEST_METHOD"] == "GET":
            upload = re.search(r"uploadId=[^&]+", environ["QUERY_STRING"])
            assert upload
            text = re.sub(rb"<PartNumber>(\d+)</PartNumber>", lambda match: match[0] + (
                f"<ChecksumSHA256>{self._parts[upload[0], match[1].decode()]}</ChecksumSHA256>".encode()), text)
            headers = [(name, str(len(text)) if name.lower() == "content-length" else value) for name, value in headers]
        start(status, headers)
        if kind == "short read" and environ["REQUEST_METHOD"] == "GET":
            return [text[:len(text) // 2]]
        if kind == "damaged read" and environ["REQUEST_METHOD"] == "GET" and text:
            return [text[:-1] + bytes([text[-1] ^ 1])]
        return [text]


def _error(start: Any, status: str, code: str) -> list[bytes]:
    text = ERROR.format(code, "a fault of the test").encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text))),
                   ("x-amz-bucket-region", "eu-west-1")])
    return [text]


def _reset(environ: dict[str, Any]) -> list[bytes]:
    sock: socket.socket = environ["werkzeug.socket"]
    sock.shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError


@contextmanager
def serving() -> Iterator[Server]:
    """Run an empty server, with environment variables that make boto3 use it."""
    from moto.moto_api._internal import moto_api_backend

    moto_api_backend.reset()  # buckets are the process's: they outlive a server
    server = Server()
    before = dict(os.environ)
    os.environ.update(KEYS, AWS_ENDPOINT_URL=server.url)
    try:
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.close()


def plain_client() -> Any:
    """A boto3 client that does not go through the package."""
    import boto3

    return boto3.client("s3")


def write_model(folder: Path, seed: int) -> dict[str, bytes]:
    """Write a small folder like that of a model: weights of several parts, a few small files, an empty one.

    Returns its content by file name.
    """
    dice = random.Random(seed)
    content = {"unet/weights.safetensors": dice.randbytes(5 * PART_SIZE + dice.randrange(PART_SIZE)),
               "vae/weights.safetensors": dice.randbytes(2 * PART_SIZE), "model_index.json": b'{"a": 1}',
               "unet/config.json": dice.randbytes(100), "empty.txt": b""}
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return content


def in_bucket(bucket: str, prefix: str) -> dict[str, bytes]:
    """Return every object below a prefix. Call it while no fault is set."""
    s3 = plain_client()
    listed = s3.list_objects_v2(Bucket=bucket, Prefix=prefix + "/").get("Contents", ())
    return {item["Key"].removeprefix(prefix + "/"): s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
            for item in listed}


def trial(server: Server, folder: Path, kind: str, seed: int) -> tuple[int, int]:
    """Upload under a fault, check, and repeat without the fault; then the same for a download.

    "denied" applies from a random request on. "killed" sends SIGKILL when a random request arrives. Any other fault
    applies to each of the first 12 requests with probability 1/3.

    Returns:
        The exit codes of the upload and the download under the fault.
    """
    from dreambooth.storage import manifest

    dice, bucket, prefix = random.Random(seed), "faults", f"{kind.replace(' ', '-')}-{seed}"
    server.fault = lambda number, method: None
    plain_client().create_bucket(Bucket=bucket)
    content = write_model(folder / "model", seed)
    uri = f"s3://{bucket}/{prefix}"

    def is_complete() -> bool:
        objects = in_bucket(bucket, prefix)
        if manifest.NAME not in objects:
            return False
        assert {name: objects.get(name) for name in content} == content, f"{kind} {seed}: a manifest over missing bytes"
        return True

    def check_local_files() -> None:
        assert {name: (folder / "model" / name).read_bytes() for name in content} == content, "a local file was lost"

    code = _command(server, dice, kind, ["upload", str(folder / "model"), uri])
    check_local_files()
    assert (code == 0) == is_complete() or kind == "killed", f"{kind} {seed}: exit code {code}"
    again = _command(server, dice, None, ["upload", str(folder / "model"), uri])
    assert again == 0 and is_complete(), f"{kind} {seed}: the repeated command ends with {again}"
    check_local_files()
    cache = folder / "cache"
    down = _command(server, dice, kind, ["download", uri, str(cache)])
    downloaded = [path for path in cache.glob("*/*") if not path.name.startswith(".")]
    assert len(downloaded) == 1 if down == 0 else kind == "killed" or not downloaded, f"{kind} {seed}: exit code {down}"
    assert _command(server, dice, None, ["download", uri, str(cache)]) == 0
    [downloaded_folder] = [path for path in cache.glob("*/*") if not path.name.startswith(".")]
    arrived = {path.relative_to(downloaded_folder).as_posix(): path.read_bytes()
               for path in downloaded_folder.rglob("*") if path.is_file()}
    assert arrived == content, f"{kind} {seed}: other bytes arrived"
    return code, down


def _command(server: Server, dice: random.Random, kind: str | None, words: list[str]) -> int:
    first = len(server.calls)
    moment = dice.randrange(2, 13)
    child = subprocess.Popen([PYTHON, "-c", COMMAND.format(part_size=PART_SIZE, timeout=READ_TIMEOUT), *words],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def fault(number: int, method: str) -> str | None:
        request = number - first
        if kind == "killed":
            if request == moment:
                child.send_signal(signal.SIGKILL)
            return None
        if kind == "denied":
            return kind if request >= moment else None
        return kind if kind and request < 12 and dice.random() < 1 / 3 else None

    server.fault = fault
    _, errors = child.communicate(timeout=600)
    server.fault = lambda number, method: None
    assert "Traceback" not in errors, errors
    assert child.returncode in (0, 1, -9), errors
    if child.returncode == 1:
        assert re.fullmatch(r"dreambooth: [^\n]+\n", errors), errors
    return child.returncode
