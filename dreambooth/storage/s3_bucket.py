"""A folder in S3: what is there, and calls that are repeated when they may succeed a moment later."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

from dreambooth.config.storage import SCHEME, is_remote
from dreambooth.errors import UserError
from dreambooth.storage import aws_errors, manifest
from dreambooth.storage.manifest import Entries, Entry
from dreambooth.utils.console import Console

ATTEMPTS = 5  # of one call
PAUSE = 0.5  # seconds after the first failure, doubling
ABSENT = {"404", "NoSuchKey", "NotFound"}
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A folder or object in S3."""

    bucket: str
    prefix: str  # without slashes at its ends

    @classmethod
    def of(cls, uri: str) -> "Place":
        bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
        if not is_remote(uri) or not bucket or not prefix.strip("/"):
            raise UserError(f"{uri!r} is no place in S3: type s3://BUCKET/FOLDER")
        return cls(bucket, prefix.strip("/"))

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if name else self.prefix

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}"


def calling(call: Callable[[], T], doing: str, where: object, bucket: str | None = None) -> T:
    """What the call returns; one that may succeed a moment later is repeated.

    Args:
        doing: the permission that it needs.

    Raises:
        UserError: what AWS said, in a sentence.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if not aws_errors.known(error):
                raise
            if attempt == ATTEMPTS or not aws_errors.passing(error):
                raise UserError(aws_errors.sentence(error, doing, str(where), bucket)) from error
            time.sleep(PAUSE * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _unless_absent(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What S3 answers about an object; None: it is not there."""
    try:
        return call()
    except Exception as error:
        if aws_errors.code(error) in ABSENT:
            return None
        raise


class Bucket:
    """A client, a pool of threads, a place."""

    def __init__(self, place: Place, s3: Any, pool: ThreadPoolExecutor, console: Console) -> None:
        self.place, self.s3, self.pool, self.console = place, s3, pool, console
        self._read: dict[tuple[str, str], bool] = {}  # name and ETag -> whether it was found to be what it must be

    def call(self, doing: str, name: str, call: Callable[[], T]) -> T:
        """One call about an object of the place."""
        return calling(call, doing, f"{SCHEME}{self.place.bucket}/{self.place.key(name)}", self.place.bucket)

    def where(self, name: str) -> dict[str, Any]:
        """The arguments that name an object."""
        return {"Bucket": self.place.bucket, "Key": self.place.key(name)}

    def each(self, work: Iterable[Callable[[], object]], tick: Callable[[], None]) -> None:
        """Do all of it at once; the first failure ends what has not begun."""
        running = [self.pool.submit(do) for do in work]
        try:
            for done in as_completed(running):
                done.result()
                tick()
        finally:
            for one in running:
                one.cancel()

    def read(self, name: str) -> bytes:
        """A small object."""
        body: bytes = self.call("s3:GetObject", name, lambda: self.s3.get_object(
            **self.where(name), ChecksumMode="ENABLED")["Body"].read())
        return body

    def kept(self) -> Entries | None:
        """What the manifest names; None: there is no manifest."""
        def get() -> bytes | None:
            answer = _unless_absent(lambda: self.s3.get_object(**self.where(manifest.NAME), ChecksumMode="ENABLED"))
            return None if answer is None else answer["Body"].read()

        text = self.call("s3:GetObject", manifest.NAME, get)
        return None if text is None else manifest.parsed(text, str(self.place))

    def part(self, name: str, start: int, size: int, **more: str) -> bytes:
        """Some bytes of an object."""
        body: bytes = self.call("s3:GetObject", name, lambda: self.s3.get_object(
            **self.where(name), Range=f"bytes={start}-{start + size - 1}", **more)["Body"].read())
        return body

    def compared(self, entries: Entries) -> tuple[Entries, list[str]]:
        """The files that S3 does not hold, and the names as which it holds something else."""
        held = dict(zip(entries, self.pool.map(lambda item: self.holds(*item), entries.items()), strict=True))
        return ({name: entries[name] for name, same in held.items() if same is None},
                [name for name, same in held.items() if same is False])

    def holds(self, name: str, entry: Entry) -> bool | None:
        """Whether S3 holds exactly this; None: there is nothing of that name."""
        found = self.call("s3:GetObject", name, lambda: _unless_absent(
            lambda: self.s3.head_object(**self.where(name), ChecksumMode="ENABLED")))
        if found is None:
            return None
        same = entry.is_in(found["ContentLength"], found.get("ChecksumSHA256"))
        return self._reads(name, entry, found["ETag"]) if same is None else same

    def _reads(self, name: str, entry: Entry, tag: str) -> bool:
        """Whether an object is this, found by reading it, once: S3 keeps no SHA-256 of what other tools put there."""
        if (name, tag) not in self._read:
            self._read[name, tag] = not entry.size or all(
                sha256(self.part(name, *span, IfMatch=tag)).hexdigest() == digest
                for span, digest in zip(entry.spans(), entry.parts, strict=True))
        return self._read[name, tag]

    def listed(self) -> Entries:
        """Every object below the place with what S3 says of it; the place itself, if it is an object, is ''."""
        found: Entries = {}
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.place.bucket, Prefix=self.place.prefix)
        answers: list[dict[str, Any]] = self.call("s3:ListBucket", "", partial(list, pages))
        for answer in answers:
            for item in answer.get("Contents", ()):
                name = item["Key"].removeprefix(self.place.prefix)
                if name == "" or (name.startswith("/") and not name.endswith("/")):
                    found[manifest.safe(name[1:], str(self.place)) if name else ""] = Entry(
                        item["Size"], tag=item["ETag"])
        if len(found) > 1:
            found.pop("", None)  # what some tools put there to stand for the folder
        return found
