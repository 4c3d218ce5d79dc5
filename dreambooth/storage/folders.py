"""Uploads and downloads S3 folders: in parallel, resumable, verified at both ends. Nothing in S3 is ever deleted.

The command is `python -m dreambooth.storage upload FOLDER s3://BUCKET/PREFIX`. Only this
file and dreambooth/cloud/ use boto3.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth.errors import UserError
from dreambooth.storage import manifest
from dreambooth.storage.download import fetch
from dreambooth.storage.manifest import Entries
from dreambooth.storage.s3_bucket import Bucket, S3Location, call_with_retries
from dreambooth.storage.upload import DestinationOccupied, upload_entries
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console

PARALLEL = 8  # number of simultaneous transfers
# Service -> what needs boto3, and the extra that contains boto3.
USERS = {"s3": ("s3://", "s3"), "secretsmanager": ("AWS Secrets Manager", "s3"), "sagemaker": ("SageMaker", "aws"),
         "application-autoscaling": ("autoscaling", "aws"), "cloudwatch": ("autoscaling", "aws")}
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60  # timeouts in seconds; READ_TIMEOUT counts from the last received byte


class RemoteContent(NamedTuple):
    """Summary of what an S3 address contains."""

    digest: str  # hash of the content, ten hex digits
    is_folder: bool  # False: a single object
    is_complete: bool  # whether the folder has a manifest


def client(service: str, connections: int = 10, region: str | None = None) -> Any:
    """Create a boto3 client that retries transient errors and throttled calls.

    At the level DEBUG, botocore logs session tokens and whole requests. It logs nothing below INFO here, even if the
    root logger does (hydra.verbose=true), unless the user has chosen a level for botocore itself.

    Args:
        region: None: the region of the AWS configuration, or that of AWS_REGION, which SageMaker sets in its containers
            and boto3 does not read.

    Raises:
        UserError: boto3 is not installed, or no AWS region is configured.
    """
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError as error:
        user, extra = USERS[service]
        raise UserError(f"{user} needs a package: pip install 'dreambooth[{extra}]'") from error
    if (logger := logging.getLogger("botocore")).level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    config = Config(retries={"mode": "standard", "total_max_attempts": 3}, max_pool_connections=connections,
                    connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT)

    def create() -> Any:
        session = Session()
        name = region or session.region_name or os.environ.get("AWS_REGION")
        return session.client(service, region_name=name, config=config)

    return call_with_retries(create, service, service)


def upload(folder: Path, uri: str, console: Console | None = None, parallel: int = PARALLEL) -> None:
    """Upload a local folder to S3. Files that S3 already has are not sent again.

    Raises:
        UserError: S3 rejects or loses a file.
        DestinationOccupied: the address has a complete folder with other content, or a file that has the same name as
            a local file and other content.
    """
    with _open_bucket(uri, console, parallel) as bucket:
        upload_entries(bucket, manifest.hash_folder(folder), folder)


def upload_with_fallback(folder: Path, uri: str, entries: Entries, console: Console | None, parallel: int, *,
                         core: str = "", check: Callable[[], None] = lambda: None) -> str:
    """Upload a folder to the first free address of URI, URI.2, URI.3 and so on.

    This function is for results and checkpoints. They are uploaded after hours of training, when no user can be asked
    for another address. An address is free unless `upload` would raise DestinationOccupied for it.

    Args:
        entries: manifest entries of the files to upload.
        core: prefix of file names, such as "model/". If a complete folder in S3 has the same files under this prefix,
            nothing is uploaded, and the address of this folder is returned.
        check: called after each part that was sent; an exception that it raises ends the upload.

    Returns:
        The address of the complete folder.

    Raises:
        UserError: S3 rejects or loses a file.
    """
    def of_core(all_entries: Entries) -> Entries:
        return {name: entry for name, entry in all_entries.items() if name.startswith(core)}

    for candidate in chain([uri], (f"{uri}.{number}" for number in count(2))):
        with _open_bucket(candidate, console, parallel, check) as bucket, suppress(DestinationOccupied):
            existing = bucket.read_manifest()
            if existing is None or of_core(existing) != of_core(entries):
                upload_entries(bucket, entries, folder)
            return candidate
    raise AssertionError("unreachable")


def check_destination(uri: str) -> None:
    """Check that the content of an S3 address can be listed. Call this before a run whose results are uploaded there.

    Raises:
        UserError: `uri` is not an S3 address, the bucket does not exist, or the credentials do not suffice.
    """
    with _open_bucket(uri, None, 1) as bucket:
        bucket.check_access()


def strip_fallback_number(name: str) -> str:
    """Remove the number that `upload_with_fallback` appended to a folder name: return step-000100 for step-000100.2."""
    return name.partition(".")[0]


def download(uri: str, cache: Path, console: Console | None = None, parallel: int = PARALLEL, *,
             complete: bool = False) -> Path:
    """Download an S3 folder or object into a folder below `cache`, and return the local path.

    Args:
        complete: whether to raise UserError if the S3 folder has no manifest, as callers require for models.

    Raises:
        UserError: nothing is stored at `uri`, a file of the manifest is missing or has another size, the folder has no
            manifest although `complete` is set, or the files arrived damaged several times.
        DoesNotFit: the disk has too little free space.
    """
    with _open_bucket(uri, console, parallel) as bucket:
        return fetch(bucket, cache, complete)


def read_json(uri: str) -> dict[str, Any]:
    """Read a small JSON object from S3.

    Raises:
        UserError: the object does not exist.
        ValueError: the content of the S3 object is not a JSON object.
    """
    with _open_bucket(uri, None, 1) as bucket:
        content = json.loads(bucket.read_object(""))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def read_files(uri: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the content of small objects below an S3 address, by name relative to the address.

    Args:
        wanted: whether to read the object with a given name.
    """
    with _open_bucket(uri, None, 1) as bucket:
        return {name: bucket.read_object(name) for name in sorted(bucket.list_objects()) if wanted(name)}


def list_sizes(uri: str) -> dict[str, int]:
    """Return the size in bytes of all objects below an S3 address, by name relative to the address.

    If the address is the key of an object, this object is returned under the name "".
    """
    with _open_bucket(uri, None, 1) as bucket:
        return {name: entry.size for name, entry in sorted(bucket.list_objects().items())}


def digest(folder: Path) -> str:
    """Return a hash of ten hex digits over the content of a local folder."""
    return manifest.digest(manifest.hash_folder(folder))


def inspect(uri: str) -> RemoteContent | None:
    """Return a summary of the content of an S3 address, or None if nothing is stored there."""
    with _open_bucket(uri, None, 1) as bucket:
        complete = bucket.read_manifest()
        entries = bucket.list_objects() if complete is None else complete
    if not entries:
        return None
    return RemoteContent(manifest.digest(entries), is_folder="" not in entries, is_complete=complete is not None)


def read_manifest(uri: str) -> Entries | None:
    """Return the manifest entries of an S3 folder, or None if the folder has no manifest."""
    with _open_bucket(uri, None, 1) as bucket:
        return bucket.read_manifest()


def list_complete_folders(uri: str) -> list[str]:
    """Return the addresses of all folders with a manifest directly below an address, sorted by numbers in their names.

    Folders are sorted by step: step-000100 comes before step-000200. Folders of the same step are sorted by the number
    that `upload_with_fallback` appended: step-000100 comes before step-000100.2.
    """
    def numbers(name: str) -> tuple[int, int]:
        step, _, fallback = name.partition(".")
        return atomic_files.trailing_number(Path(step)), int(fallback) if fallback.isdecimal() else 1

    with _open_bucket(uri, None, 1) as bucket:
        listed = bucket.list_objects()
    names = {name.partition("/")[0] for name in listed if name.partition("/")[2] == manifest.NAME}
    return [f"{uri.rstrip('/')}/{name}" for name in sorted(names, key=numbers)]


@contextmanager
def _open_bucket(uri: str, console: Console | None, parallel: int,
                 check: Callable[[], None] = lambda: None) -> Iterator[Bucket]:
    location = S3Location.parse(uri)
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="s3")
    try:
        yield Bucket(location, client("s3", parallel + 2), pool, console or Console(quiet=True), check)
    finally:
        pool.shutdown(cancel_futures=True)
