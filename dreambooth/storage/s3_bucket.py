"""Calls to one folder or object in S3: listing, reading, comparing with a manifest, and retries."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

from dreambooth.config.storage import S3_SCHEME, is_remote
from dreambooth.errors import UserError
from dreambooth.storage import aws_errors, manifest
from dreambooth.storage.manifest import Entries, Entry
from dreambooth.utils.console import Console

ATTEMPTS = 5  # per call
PAUSE = 0.5  # seconds after the first failure, doubled after each further one
NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
T = TypeVar("T")


@dataclass(frozen=True)
class S3Location:
    """The address of a folder or object in S3."""

    bucket: str
    prefix: str  # without leading and trailing slashes

    @classmethod
    def parse(cls, uri: str) -> "S3Location":
        """Parse s3://BUCKET/PREFIX.

        Raises:
            UserError: `uri` is not such an address.
        """
        bucket, _, prefix = uri.removeprefix(S3_SCHEME).partition("/")
        if not is_remote(uri) or not bucket or not prefix.strip("/"):
            raise UserError(f"{uri!r} is not an S3 address: type s3://BUCKET/PREFIX")
        return cls(bucket, prefix.strip("/"))

    def key(self, name: str) -> str:
        """Return the key of an object by its name below the folder; "" names the location itself."""
        return f"{self.prefix}/{name}" if name else self.prefix

    def __str__(self) -> str:
        return f"{S3_SCHEME}{self.bucket}/{self.prefix}"


def call_with_retries(call: Callable[[], T], permission: str, where: object, bucket: str | None = None) -> T:
    """Return the result of a call to AWS; retry it after a transient error.

    Args:
        permission: the IAM action that the call needs, such as s3:GetObject.
        where: the object or service of the call, for error messages.
        bucket: the bucket, if it is a call to S3.

    Raises:
        UserError: the call failed; the message is one sentence.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if not aws_errors.is_aws_error(error):
                raise
            if attempt == ATTEMPTS or not aws_errors.is_transient(error):
                raise UserError(aws_errors.describe_error(error, permission, str(where), bucket)) from error
            time.sleep(PAUSE * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _none_if_not_found(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return call()
    except Exception as error:
        if aws_errors.error_code(error) in NOT_FOUND:
            return None
        raise


class Bucket:
    """One S3 location with the client and the threads that access it. Object names are relative to the location."""

    def __init__(self, location: S3Location, s3: Any, pool: ThreadPoolExecutor, console: Console) -> None:
        """Args:
            s3: a boto3 client.
            pool: threads for parallel transfers.
            console: shows progress.
        """
        self.location, self.s3, self.pool, self.console = location, s3, pool, console
        self._verified: dict[tuple[str, str], bool] = {}  # (name, ETag) -> whether its bytes are as expected

    def object_arguments(self, name: str) -> dict[str, Any]:
        """Return the arguments of an S3 call that name an object."""
        return {"Bucket": self.location.bucket, "Key": self.location.key(name)}

    def call(self, permission: str, name: str, call: Callable[[], T]) -> T:
        """Call AWS for one object, with retries, see `call_with_retries`."""
        where = f"{S3_SCHEME}{self.location.bucket}/{self.location.key(name)}"
        return call_with_retries(call, permission, where, self.location.bucket)

    def run_all(self, tasks: Iterable[Callable[[], object]], tick: Callable[[], None]) -> None:
        """Run tasks in parallel; after the first failure, tasks that have not started are cancelled.

        Args:
            tick: called after each finished task.
        """
        running = [self.pool.submit(task) for task in tasks]
        try:
            for done in as_completed(running):
                done.result()
                tick()
        finally:
            for future in running:
                future.cancel()

    def read_object(self, name: str) -> bytes:
        """Read a small object."""
        body: bytes = self.call("s3:GetObject", name, lambda: self.s3.get_object(
            **self.object_arguments(name), ChecksumMode="ENABLED")["Body"].read())
        return body

    def read_range(self, name: str, start: int, size: int, **more: str) -> bytes:
        """Read `size` bytes of an object from offset `start`."""
        body: bytes = self.call("s3:GetObject", name, lambda: self.s3.get_object(
            **self.object_arguments(name), Range=f"bytes={start}-{start + size - 1}", **more)["Body"].read())
        return body

    def read_manifest(self) -> Entries | None:
        """Read the manifest; None if there is none, which means that the folder is not complete."""
        def get() -> bytes | None:
            response = _none_if_not_found(
                lambda: self.s3.get_object(**self.object_arguments(manifest.NAME), ChecksumMode="ENABLED"))
            return None if response is None else response["Body"].read()

        text = self.call("s3:GetObject", manifest.NAME, get)
        return None if text is None else manifest.parse(text, str(self.location))

    def list_objects(self) -> Entries:
        """List every object below the location with its size and ETag. If the location is an object, its name is ""."""
        entries: Entries = {}
        pages = self.s3.get_paginator("list_objects_v2").paginate(
            Bucket=self.location.bucket, Prefix=self.location.prefix)
        responses: list[dict[str, Any]] = self.call("s3:ListBucket", "", partial(list, pages))
        for response in responses:
            for item in response.get("Contents", ()):
                name = item["Key"].removeprefix(self.location.prefix)
                if name == "" or (name.startswith("/") and not name.endswith("/")):
                    entries[manifest.check_name(name[1:], str(self.location)) if name else ""] = Entry(
                        item["Size"], etag=item["ETag"])
        if len(entries) > 1:
            entries.pop("", None)  # some tools create such an object to represent the folder
        return entries

    def compare(self, entries: Entries) -> tuple[Entries, list[str]]:
        """Return the entries that S3 does not have, and the names under which it has other content."""
        results = dict(zip(entries, self.pool.map(lambda item: self.holds(*item), entries.items()), strict=True))
        return ({name: entries[name] for name, same in results.items() if same is None},
                [name for name, same in results.items() if same is False])

    def holds(self, name: str, entry: Entry) -> bool | None:
        """Return whether S3 has exactly this content under a name; None: there is no object of that name."""
        head = self.call("s3:GetObject", name, lambda: _none_if_not_found(
            lambda: self.s3.head_object(**self.object_arguments(name), ChecksumMode="ENABLED")))
        if head is None:
            return None
        same = entry.matches(head["ContentLength"], head.get("ChecksumSHA256"))
        return self._content_matches(name, entry, head["ETag"]) if same is None else same

    def _content_matches(self, name: str, entry: Entry, etag: str) -> bool:
        """Download an object once and compare it, because S3 stores no SHA-256 of objects that other tools uploaded."""
        if (name, etag) not in self._verified:
            self._verified[name, etag] = not entry.size or all(
                sha256(self.read_range(name, *span, IfMatch=etag)).hexdigest() == digest
                for span, digest in zip(entry.spans(), entry.parts, strict=True))
        return self._verified[name, etag]
