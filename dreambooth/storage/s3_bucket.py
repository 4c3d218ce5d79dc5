"""Access to one folder or object in S3: lists and reads objects, compares them with a manifest, and retries calls."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

from dreambooth.config.storage import S3_SCHEME, is_s3_folder
from dreambooth.errors import UserError
from dreambooth.storage import aws_errors, manifest
from dreambooth.storage.manifest import Entries, Entry
from dreambooth.utils.console import Console

ATTEMPTS = 5  # maximum number of attempts per call
PAUSE = 0.5  # seconds after the first failure, doubled after each further failure
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
            UserError: `uri` does not have this form.
        """
        bucket, _, prefix = uri.removeprefix(S3_SCHEME).partition("/")
        if not is_s3_folder(uri):
            raise UserError(f"{uri!r} is not an S3 address: type s3://BUCKET/PREFIX")
        return cls(bucket, prefix.strip("/"))

    def key(self, name: str) -> str:
        """Return the key of the object `name` below this location; for the name "", the key of the location itself."""
        return f"{self.prefix}/{name}" if name else self.prefix

    def __str__(self) -> str:
        return f"{S3_SCHEME}{self.bucket}/{self.prefix}"


def call_with_retries(call: Callable[[], T], permission: str, where: object, bucket: str | None = None) -> T:
    """Call AWS and return the result. Repeat the call after a transient error.

    Args:
        permission: the IAM action that the call needs, such as s3:GetObject.
        where: the S3 object or the AWS service of the call, for error messages.
        bucket: the bucket of the call; None if the call is not to S3.

    Raises:
        UserError: the call failed. The message is one sentence.
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
        if aws_errors.is_missing(error):
            return None
        raise


class Bucket:
    """One S3 location, and the boto3 client and threads that access it. Object names are relative to the location."""

    def __init__(self, location: S3Location, s3: Any, pool: ThreadPoolExecutor, console: Console,
                 check: Callable[[], None] = lambda: None) -> None:
        """Args:
            s3: a boto3 client.
            pool: the threads for parallel transfers.
            console: the console that shows progress.
            check: called after each finished task of `run_all`; an exception that it raises ends the transfer.
        """
        self.location, self.s3, self.pool, self.console, self.check = location, s3, pool, console, check
        self._verified: dict[tuple[str, str], bool] = {}  # the key is (name, ETag); see `_content_matches`

    def object_arguments(self, name: str) -> dict[str, Any]:
        """Return the arguments that identify an object in an S3 call: its bucket and key."""
        return {"Bucket": self.location.bucket, "Key": self.location.key(name)}

    def call(self, permission: str, name: str, call: Callable[[], T]) -> T:
        """Make an AWS call that concerns the object `name`, with retries, and return its result."""
        where = f"{S3_SCHEME}{self.location.bucket}/{self.location.key(name)}"
        return call_with_retries(call, permission, where, self.location.bucket)

    def run_all(self, tasks: Iterable[Callable[[], object]], tick: Callable[[], None]) -> None:
        """Run tasks in parallel. After the first failure, cancel all tasks that have not started.

        Args:
            tick: called after each finished task.
        """
        running = [self.pool.submit(task) for task in tasks]
        try:
            for done in as_completed(running):
                done.result()
                tick()
                self.check()
        finally:
            for future in running:
                future.cancel()

    def read_object(self, name: str) -> bytes:
        """Return the content of a small object."""
        body: bytes = self.call("s3:GetObject", name, lambda: self.s3.get_object(
            **self.object_arguments(name), ChecksumMode="ENABLED")["Body"].read())
        return body

    def read_range(self, name: str, start: int, size: int, **more: str) -> bytes:
        """Return `size` bytes of an object, beginning at offset `start`."""
        body: bytes = self.call("s3:GetObject", name, lambda: self.s3.get_object(
            **self.object_arguments(name), Range=f"bytes={start}-{start + size - 1}", **more)["Body"].read())
        return body

    def read_manifest(self) -> Entries | None:
        """Return the entries of the manifest at the location, by file name, or None if there is no manifest.

        A folder without a manifest has not been uploaded completely.
        """
        def get() -> bytes | None:
            response = _none_if_not_found(
                lambda: self.s3.get_object(**self.object_arguments(manifest.NAME), ChecksumMode="ENABLED"))
            return None if response is None else response["Body"].read()

        text = self.call("s3:GetObject", manifest.NAME, get)
        return None if text is None else manifest.parse(text, str(self.location))

    def check_access(self) -> None:
        """Check that the bucket exists and that its objects can be listed.

        Raises:
            UserError: the bucket cannot be listed.
        """
        self.call("s3:ListBucket", "", lambda: self.s3.list_objects_v2(
            Bucket=self.location.bucket, Prefix=self.location.prefix, MaxKeys=1))

    def list_objects(self) -> Entries:
        """Return size and ETag of all objects below the location, by name relative to the location.

        If there are none, the location may itself be the key of an object. This object is returned under the name "".
        """
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
            entries.pop("", None)  # an empty object that some tools create to represent a folder
        return entries

    def compare(self, entries: Entries) -> tuple[Entries, list[str]]:
        """Compare the objects in S3 with the entries of a manifest.

        Returns:
            The entries whose objects do not exist in S3, and the names of the objects that differ from their entry.
        """
        results = dict(zip(entries, self.pool.map(lambda item: self.holds(*item), entries.items()), strict=True))
        return ({name: entries[name] for name, same in results.items() if same is None},
                [name for name, same in results.items() if same is False])

    def holds(self, name: str, entry: Entry) -> bool | None:
        """Return whether the object `name` has the content of `entry`, or None if the object does not exist."""
        head = self.call("s3:GetObject", name, lambda: _none_if_not_found(
            lambda: self.s3.head_object(**self.object_arguments(name), ChecksumMode="ENABLED")))
        if head is None:
            return None
        same = entry.matches(head["ContentLength"], head.get("ChecksumSHA256"))
        return self._content_matches(name, entry, head["ETag"]) if same is None else same

    def _content_matches(self, name: str, entry: Entry, etag: str) -> bool:
        """Download an object and return whether its content matches `entry`.

        This is needed because S3 may store no SHA-256 of objects that other tools uploaded. An object is not
        downloaded again as long as its name and ETag are the same.
        """
        if (name, etag) not in self._verified:
            self._verified[name, etag] = not entry.size or all(
                sha256(self.read_range(name, *span, IfMatch=etag)).hexdigest() == digest
                for span, digest in zip(entry.spans(), entry.parts, strict=True))
        return self._verified[name, etag]
