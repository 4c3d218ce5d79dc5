"""Folders in S3: parallel, resumable, verified on both sides, never half there. Nothing in S3 is ever deleted.

By hand: `python -m dreambooth.storage upload FOLDER s3://BUCKET/PREFIX`. The only file, with cloud/, that knows boto3.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth.config.storage import SCHEME as SCHEME
from dreambooth.config.storage import is_remote as is_remote
from dreambooth.errors import UserError
from dreambooth.storage import manifest
from dreambooth.storage.download import fetch
from dreambooth.storage.manifest import Entries
from dreambooth.storage.s3_bucket import Bucket, Place, calling
from dreambooth.storage.upload import Taken, send
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console

PARALLEL = 8  # transfers at a time
CONNECT, TIMEOUT = 10, 60  # seconds to connect; without a byte


class Held(NamedTuple):
    """What is at a place in S3."""

    digest: str  # ten hex digits over its content
    folder: bool  # else one object
    complete: bool  # by its manifest


def client(service: str, connections: int = 10) -> Any:
    """A client of boto3 that asks again when AWS is busy.

    Raises:
        UserError: boto3 is not installed, or there is no region.
    """
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError as error:
        raise UserError("s3:// and SageMaker need a package: pip install 'dreambooth[aws]'") from error
    config = Config(retries={"mode": "standard", "total_max_attempts": 3}, max_pool_connections=connections,
                    connect_timeout=CONNECT, read_timeout=TIMEOUT)
    return calling(lambda: Session().client(service, config=config), service, service)


def upload(folder: Path, uri: str, console: Console | None = None, parallel: int = PARALLEL) -> None:
    """Make a local folder complete at a place; what is there already is not sent again.

    Raises:
        UserError: S3 does not take or keep it, or another complete folder is there, which is never replaced.
        Taken: there is no complete folder, but a file with other bytes.
    """
    with _opened(uri, console, parallel) as bucket:
        send(bucket, manifest.of_folder(folder), folder)


def upload_beside(folder: Path, uri: str, entries: Entries, console: Console | None, parallel: int, *,
                  core: str = "") -> str:
    """`upload` for who cannot be asked for another place: where an upload of something else was begun and never
    finished, the folder goes to PLACE.2, or on to the first such place that is free.

    Args:
        entries: what of the folder.
        core: what the files' names begin with that make a complete folder the same as this one.

    Returns:
        Where it is complete.
    """
    def of_core(all_of_it: Entries) -> Entries:
        return {name: entry for name, entry in all_of_it.items() if name.startswith(core)}

    for place in chain([uri], (f"{uri}.{number}" for number in count(2))):
        with _opened(place, console, parallel) as bucket, suppress(Taken):
            there = bucket.kept()
            if there is None or of_core(there) != of_core(entries):
                send(bucket, entries, folder)
            return place
    raise AssertionError("unreachable")


def download(uri: str, cache: Path, console: Console | None = None, parallel: int = PARALLEL, *,
             complete: bool = False) -> Path:
    """A local copy, below `cache`, of a folder or file in S3.

    Args:
        complete: take only what has a manifest, as a model must.

    Raises:
        UserError: it is not there, not complete or did not arrive right.
        DoesNotFit: the disk is too small.
    """
    with _opened(uri, console, parallel) as bucket:
        return fetch(bucket, cache, complete)


def read_json(uri: str) -> dict[str, Any]:
    """A small JSON object in S3.

    Raises:
        UserError: it is not there.
        ValueError: it is something else.
    """
    with _opened(uri, None, 1) as bucket:
        found = json.loads(bucket.read(""))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def digest(folder: Path) -> str:
    """Ten hex digits over the content of a local folder."""
    return manifest.digest(manifest.of_folder(folder))


def held(uri: str) -> Held | None:
    """What is at a place in S3; None: nothing."""
    with _opened(uri, None, 1) as bucket:
        kept = bucket.kept()
        found = bucket.listed() if kept is None else kept
    return Held(manifest.digest(found), "" not in found, kept is not None) if found else None


def complete(uri: str) -> Entries | None:
    """What a complete folder holds; None: there is none, or not all of it."""
    with _opened(uri, None, 1) as bucket:
        return bucket.kept()


def complete_folders(uri: str) -> list[str]:
    """The complete folders right below a place, by the number in their names; none if there is nothing. One beside
    another (`upload_beside`) has the number of that."""
    with _opened(uri, None, 1) as bucket:
        listed = bucket.listed()
    names = {name.partition("/")[0] for name in listed if name.partition("/")[2] == manifest.NAME}
    numbered = sorted((atomic_files.number_of(Path(first_of(name))), name) for name in names)
    return [f"{uri.rstrip('/')}/{name}" for _, name in numbered]


def first_of(name: str) -> str:
    """step-000100 of step-000100.2: the name that `upload_beside` was asked for."""
    return name.partition(".")[0]


@contextmanager
def _opened(uri: str, console: Console | None, parallel: int) -> Iterator[Bucket]:
    place = Place.of(uri)
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="s3")
    try:
        yield Bucket(place, client("s3", parallel + 2), pool, console or Console(quiet=True))
    finally:
        pool.shutdown(cancel_futures=True)
