"""Downloads a folder from S3 into a local cache. The name of a cached folder contains a hash of the folder's content.

Files are downloaded into a temporary folder, which is renamed after all files have been verified.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import md5, sha256
from pathlib import Path

from dreambooth.errors import DoesNotFit, UserError
from dreambooth.storage import manifest
from dreambooth.storage.manifest import Entries, Entry
from dreambooth.storage.s3_bucket import Bucket
from dreambooth.utils import atomic_files, file_lock
from dreambooth.utils.quoting import shell_word

GIB = 2**30
ROUNDS = 3  # attempts to download missing or damaged files
BLOCK = 2**20  # number of bytes per read


class BadDigest(Exception):
    """Raised if the content of an object differs from its ETag.

    The class is named like S3's error code for this case, so that aws_errors.py handles both errors in the same way.
    """


def fetch(bucket: Bucket, cache: Path, complete: bool) -> Path:
    """Download an S3 folder or object into the cache, unless the cache already has the same content.

    Args:
        bucket: the S3 folder or object.
        cache: the local folder of all downloads.
        complete: whether to raise UserError if the S3 folder has no manifest.

    Returns:
        A local folder with exactly the files of the S3 folder, or a local file if the location is an object.

    Raises:
        UserError: nothing is stored at the S3 location, a file of the manifest is missing or has another size, the
            folder has no manifest although `complete` is set, or the files arrived damaged several times.
        DoesNotFit: the disk has too little free space.
    """
    location, listed = bucket.location, bucket.list_objects()
    if not listed:
        raise UserError(f"there is nothing at {location}: type another S3 address")
    entries = bucket.read_manifest() if manifest.NAME in listed else None
    if entries is None and complete:
        raise UserError(f"{location} has no {manifest.NAME}, so it is half uploaded or was uploaded by another tool: "
                        f"type python -m dreambooth.storage upload FOLDER {shell_word(str(location))}")
    wanted = listed if entries is None else entries
    if broken := [name for name, entry in wanted.items() if name not in listed or listed[name].size != entry.size]:
        raise UserError(f"{location} is half uploaded ({', '.join(broken[:3])} missing or truncated): repeat the "
                        "upload")
    name = location.prefix.rpartition("/")[2]
    folder = cache / location.bucket / f"{name}-{manifest.digest(wanted)}"
    with _translate_disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock.hold(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _download_files(bucket, folder, wanted)
    return folder / name if "" in wanted else folder


@contextmanager
def _translate_disk_errors(folder: Path) -> Iterator[None]:
    """Turn disk errors into messages of one sentence. s3_bucket.py does the same with errors of S3."""
    try:
        yield
    except OSError as error:
        if atomic_files.is_disk_full(error):
            raise DoesNotFit(f"the disk of {folder} is full: free some space and repeat the command, which continues "
                             "where it stopped, or type storage.cache=DIR on a larger disk") from error
        raise UserError(f"{folder} cannot be written ({error}): fix that, or type storage.cache=DIR") from error


def _download_files(bucket: Bucket, folder: Path, wanted: Entries) -> None:
    # The temporary folder stays after a failure, so that the next attempt does not download its files again.
    temporary = folder.with_name(atomic_files.TEMPORARY_PREFIX + folder.name)
    paths = {temporary / (name or bucket.location.prefix.rpartition("/")[2]): (name, entry)
             for name, entry in wanted.items()}
    for leftover in (path for path in temporary.rglob(f"{atomic_files.TEMPORARY_PREFIX}*") if path not in paths):
        leftover.unlink()  # a file that a killed process was writing
    present = sum(min(path.stat().st_blocks * 512, entry.size) for path, (_, entry) in paths.items() if path.is_file())
    needed, free = sum(entry.size for entry in wanted.values()) - present, shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DoesNotFit(f"{bucket.location} needs {needed / GIB:.1f} GiB more and {folder.parent} has "
                         f"{free / GIB:.1f} GiB free: type storage.cache=DIR on a larger disk")
    for _ in range(ROUNDS):
        parts = sum(len(entry.spans()) for entry in wanted.values())
        with bucket.console.bar(f"from {bucket.location}", parts) as bar:
            bucket.run_all((task for path, (name, entry) in paths.items()
                            for task in _file_tasks(bucket, path, name, entry)), bar.tick)
        if all(_is_correct(path, entry) for path, (_, entry) in paths.items()):
            break
    else:
        raise UserError(f"{bucket.location} did not arrive correctly several times: repeat the command, or the upload")
    for entry in [*paths, *(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        atomic_files.sync(entry)
    atomic_files.publish(temporary, folder)


def _file_tasks(bucket: Bucket, path: Path, name: str, entry: Entry) -> Iterator[partial[None]]:
    """Yield the tasks that download one file: one task per part, or one task if no manifest lists the parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not entry.parts:
        yield partial(_download_whole, bucket, path, name, entry)
        return
    with path.open("ab") as file:
        file.truncate(entry.size)
    for number, (start, size) in enumerate(entry.spans()):
        yield partial(_download_part, bucket, path, name, entry.parts[number], start, size)


def _download_part(bucket: Bucket, path: Path, name: str, digest: str, start: int, size: int) -> None:
    """Download the `size` bytes at offset `start` of a file, unless the local file already contains them.

    Args:
        path: the local file.
        name: the name of the S3 object.
        digest: the SHA-256 of these bytes.
    """
    with path.open("r+b") as file:
        if not size or sha256(os.pread(file.fileno(), size, start)).hexdigest() == digest:
            return
        body = bucket.read_range(name, start, size)
        if sha256(body).hexdigest() == digest:  # otherwise the next round tries again
            os.pwrite(file.fileno(), body, start)


def _download_whole(bucket: Bucket, path: Path, name: str, entry: Entry) -> None:
    """Download an object that no manifest describes, and verify it with the metadata that S3 stores.

    boto3 verifies the length, and the checksum if S3 stores one. This function also compares the ETag
    with the content if the ETag is an MD5.
    """
    if path.is_file():
        return

    def get() -> None:
        response = bucket.s3.get_object(**bucket.object_arguments(name), IfMatch=entry.etag, ChecksumMode="ENABLED")
        total = md5(usedforsecurity=False)
        with atomic_files.write_file(path) as temporary, temporary.open("wb") as file:
            for block in response["Body"].iter_chunks(BLOCK):
                file.write(block)
                total.update(block)
            etag, encrypted = entry.etag.strip('"'), "kms" in response.get("ServerSideEncryption", "")
            if len(etag) == 32 and not encrypted and etag != total.hexdigest():
                raise BadDigest

    bucket.call("s3:GetObject", name, get)


def _is_correct(path: Path, entry: Entry) -> bool:
    """Return whether a file has the expected size and content. The content is read from the disk again."""
    if path.stat().st_size != entry.size:
        return False
    if not entry.parts:
        return True
    with path.open("rb") as file:
        return all(sha256(file.read(size)).hexdigest() == digest
                   for (_, size), digest in zip(entry.spans(), entry.parts, strict=True))
