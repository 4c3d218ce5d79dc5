"""Uploads and downloads S3 folders: in parallel, resumable, verified at both ends. Nothing in S3 is ever deleted.

From the command line: `python -m dreambooth.storage upload FOLDER s3://BUCKET/PREFIX`. Only this file and
dreambooth/cloud/ use boto3.
"""

import json
from collections.abc import Iterator
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

PARALLEL = 8  # transfers at a time
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60  # seconds to connect; seconds without receiving a byte


class RemoteContent(NamedTuple):
    """Summary of the content of an S3 address."""

    digest: str  # hash of the content, ten hex digits
    is_folder: bool  # False: one object
    is_complete: bool  # whether it has a manifest


def client(service: str, connections: int = 10) -> Any:
    """Create a boto3 client that retries when AWS is busy.

    Raises:
        UserError: boto3 is not installed, or there is no region.
    """
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError as error:
        raise UserError("s3:// and SageMaker need a package: pip install 'dreambooth[aws]'") from error
    config = Config(retries={"mode": "standard", "total_max_attempts": 3}, max_pool_connections=connections,
                    connect_timeout=CONNECT_TIMEOUT, read_timeout=READ_TIMEOUT)
    return call_with_retries(lambda: Session().client(service, config=config), service, service)


def upload(folder: Path, uri: str, console: Console | None = None, parallel: int = PARALLEL) -> None:
    """Upload a local folder. Files that S3 already has are not sent again.

    Raises:
        UserError: S3 does not accept or keep a file, or the address has a complete folder with other content.
        DestinationOccupied: the address has no complete folder, but it has a file with other content.
    """
    with _open_bucket(uri, console, parallel) as bucket:
        upload_entries(bucket, manifest.hash_folder(folder), folder)


def upload_with_fallback(folder: Path, uri: str, entries: Entries, console: Console | None, parallel: int, *,
                         core: str = "") -> str:
    """Upload a folder to `uri`, or to the first free one of URI.2, URI.3 and so on.

    For callers that cannot prompt the user for another address. An address is not free if it has an unfinished upload
    of other content.

    Args:
        entries: the files to upload.
        core: prefix of file names. A complete folder in S3 with the same files under this prefix counts as already
            uploaded, and is not changed.

    Returns:
        The address of the complete folder.
    """
    def of_core(all_entries: Entries) -> Entries:
        return {name: entry for name, entry in all_entries.items() if name.startswith(core)}

    for candidate in chain([uri], (f"{uri}.{number}" for number in count(2))):
        with _open_bucket(candidate, console, parallel) as bucket, suppress(DestinationOccupied):
            existing = bucket.read_manifest()
            if existing is None or of_core(existing) != of_core(entries):
                upload_entries(bucket, entries, folder)
            return candidate
    raise AssertionError("unreachable")


def strip_fallback_number(name: str) -> str:
    """Return the folder name without the number that `upload_with_fallback` added: step-000100 for step-000100.2."""
    return name.partition(".")[0]


def download(uri: str, cache: Path, console: Console | None = None, parallel: int = PARALLEL, *,
             complete: bool = False) -> Path:
    """Download an S3 folder or object into a folder below `cache`, and return its local path.

    Args:
        complete: require a manifest, as for a model.

    Raises:
        UserError: the address is empty or not complete, or its files did not arrive correctly.
        DoesNotFit: the disk is too small.
    """
    with _open_bucket(uri, console, parallel) as bucket:
        return fetch(bucket, cache, complete)


def read_json(uri: str) -> dict[str, Any]:
    """Read a small JSON object from S3.

    Raises:
        UserError: the object does not exist.
        ValueError: its content is not a JSON object.
    """
    with _open_bucket(uri, None, 1) as bucket:
        content = json.loads(bucket.read_object(""))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def digest(folder: Path) -> str:
    """Return a hash of the content of a local folder, ten hex digits."""
    return manifest.digest(manifest.hash_folder(folder))


def inspect(uri: str) -> RemoteContent | None:
    """Return a summary of the content of an S3 address; None if it is empty."""
    with _open_bucket(uri, None, 1) as bucket:
        complete = bucket.read_manifest()
        entries = bucket.list_objects() if complete is None else complete
    if not entries:
        return None
    return RemoteContent(manifest.digest(entries), is_folder="" not in entries, is_complete=complete is not None)


def read_manifest(uri: str) -> Entries | None:
    """Return the entries of the manifest of an S3 folder; None if the folder is not complete."""
    with _open_bucket(uri, None, 1) as bucket:
        return bucket.read_manifest()


def list_complete_folders(uri: str) -> list[str]:
    """List the addresses of the complete folders directly below an address, sorted by the number in their names.

    For a folder that `upload_with_fallback` uploaded under a fallback name, the number in the original name counts.
    """
    with _open_bucket(uri, None, 1) as bucket:
        listed = bucket.list_objects()
    names = {name.partition("/")[0] for name in listed if name.partition("/")[2] == manifest.NAME}
    numbered = sorted((atomic_files.trailing_number(Path(strip_fallback_number(name))), name) for name in names)
    return [f"{uri.rstrip('/')}/{name}" for _, name in numbered]


@contextmanager
def _open_bucket(uri: str, console: Console | None, parallel: int) -> Iterator[Bucket]:
    location = S3Location.parse(uri)
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="s3")
    try:
        yield Bucket(location, client("s3", parallel + 2), pool, console or Console(quiet=True))
    finally:
        pool.shutdown(cancel_futures=True)
