"""Down from S3: a folder is filled beside its place, checked, then renamed; it is named by its content."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import md5, sha256
from pathlib import Path

from filelock import FileLock

from dreambooth.errors import DoesNotFit, UserError
from dreambooth.storage import manifest
from dreambooth.storage.manifest import Entries, Entry
from dreambooth.storage.s3_bucket import Bucket
from dreambooth.utils import atomic_files

GIB = 2**30
ROUNDS = 3  # of fetching what did not arrive right
BLOCK = 2**20  # bytes read at a time


class BadDigest(Exception):
    """An object that is not what its tag says; named as S3 names a body that is not what its checksum says."""


def fetch(bucket: Bucket, cache: Path, complete: bool) -> Path:
    """The local folder with exactly what is at the place, or the local file if the place is an object.

    Raises:
        UserError: it is not complete, or did not arrive right.
        DoesNotFit: the disk is too small.
    """
    place, listed = bucket.place, bucket.listed()
    if not listed:
        raise UserError(f"there is nothing at {place}: type another place")
    entries = bucket.kept() if manifest.NAME in listed else None
    if entries is None and complete:
        raise UserError(f"{place} has no {manifest.NAME}: it is half uploaded, or something else put it there; type "
                        f"python -m dreambooth.storage upload FOLDER {place}")
    wanted = listed if entries is None else entries
    if lost := [name for name, entry in wanted.items() if name not in listed or listed[name].size != entry.size]:
        raise UserError(f"{place} is half uploaded ({', '.join(lost[:3])} missing or cut short): repeat the upload")
    name = place.prefix.rpartition("/")[2]
    folder = cache / place.bucket / f"{name}-{manifest.digest(wanted)}"
    with _written(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _fill(bucket, folder, wanted)
    return folder / name if "" in wanted else folder


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """What a disk refuses, in a sentence. What S3 refuses is one already."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(f"the disk of {folder} is full: free some space and repeat the command, it goes on where "
                             "it stopped, or type storage.cache=DIR on a larger disk") from error
        raise UserError(f"{folder} cannot be written ({error}): mend that, or type storage.cache=DIR") from error


def _fill(bucket: Bucket, folder: Path, wanted: Entries) -> None:
    aside = folder.with_name(atomic_files.ASIDE + folder.name)  # kept after a failure: the next attempt goes on in it
    paths = {aside / (name or bucket.place.prefix.rpartition("/")[2]): (name, entry) for name, entry in wanted.items()}
    for half in (path for path in aside.rglob(f"{atomic_files.ASIDE}*") if path not in paths):
        half.unlink()  # of a file whose writing was killed
    here = sum(min(path.stat().st_blocks * 512, entry.size) for path, (_, entry) in paths.items() if path.is_file())
    needed, free = sum(entry.size for entry in wanted.values()) - here, shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DoesNotFit(f"{bucket.place} takes {needed / GIB:.1f} GiB more and {folder.parent} has {free / GIB:.1f} "
                         "GiB free: type storage.cache=DIR on a larger disk")
    for _ in range(ROUNDS):
        with bucket.console.bar(f"from {bucket.place}", sum(len(entry.spans()) for entry in wanted.values())) as bar:
            bucket.each((work for path, (name, entry) in paths.items()
                         for work in _works(bucket, path, name, entry)), bar.tick)
        if all(_right(path, entry) for path, (_, entry) in paths.items()):
            break
    else:
        raise UserError(f"{bucket.place} did not arrive right several times: repeat the command, or the upload")
    for entry in [*paths, *(path for path in aside.rglob("*") if path.is_dir()), aside]:
        atomic_files.sync(entry)
    atomic_files.publish(aside, folder)


def _works(bucket: Bucket, path: Path, name: str, entry: Entry) -> Iterator[partial[None]]:
    """What has to be done for one file: a part each, or the whole if only S3 knows its parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not entry.parts:
        yield partial(_stream, bucket, path, name, entry)
        return
    with path.open("ab") as file:
        file.truncate(entry.size)
    for number, (start, size) in enumerate(entry.spans()):
        yield partial(_part, bucket, path, name, entry.parts[number], start, size)


def _part(bucket: Bucket, path: Path, name: str, digest: str, start: int, size: int) -> None:
    """Fetch a part, unless an earlier attempt left it there."""
    with path.open("r+b") as file:
        if not size or sha256(os.pread(file.fileno(), size, start)).hexdigest() == digest:
            return
        body = bucket.part(name, start, size)
        if sha256(body).hexdigest() == digest:  # else the next round tries again
            os.pwrite(file.fileno(), body, start)


def _stream(bucket: Bucket, path: Path, name: str, entry: Entry) -> None:
    """Fetch an object without a manifest; what S3 knows of its content is checked: by boto3 its length and checksum, if
    S3 keeps one; here the MD5 in its tag, if it is one."""
    if path.is_file():
        return

    def get() -> None:
        answer = bucket.s3.get_object(**bucket.where(name), IfMatch=entry.tag, ChecksumMode="ENABLED")
        total = md5(usedforsecurity=False)
        with atomic_files.whole_file(path) as aside, aside.open("wb") as file:
            for block in answer["Body"].iter_chunks(BLOCK):
                file.write(block)
                total.update(block)
            tag, encrypted = entry.tag.strip('"'), "kms" in answer.get("ServerSideEncryption", "")
            if len(tag) == 32 and not encrypted and tag != total.hexdigest():
                raise BadDigest

    bucket.call("s3:GetObject", name, get)


def _right(path: Path, entry: Entry) -> bool:
    """Whether the file on disk is what it must be, read from the disk again."""
    if path.stat().st_size != entry.size:
        return False
    if not entry.parts:
        return True
    with path.open("rb") as file:
        return all(sha256(file.read(size)).hexdigest() == digest
                   for (_, size), digest in zip(entry.spans(), entry.parts, strict=True))
