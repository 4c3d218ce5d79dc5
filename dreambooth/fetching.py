"""Down from S3: a folder is filled beside its place, checked, then renamed; it is named by its content."""

import os
import shutil
from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from hashlib import md5, sha256
from pathlib import Path

from filelock import FileLock

from dreambooth import files, manifest
from dreambooth.bucket import Bucket
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.manifest import Entries, Entry

GIB = 2**30
ROUNDS = 3  # of fetching what did not arrive right
BLOCK = 2**20  # bytes read at a time


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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _fill(bucket, folder, wanted)
    return folder / name if "" in wanted else folder


def _fill(bucket: Bucket, folder: Path, wanted: Entries) -> None:
    aside = folder.with_name(files.ASIDE + folder.name)  # kept after a failure: the next attempt goes on in it
    needed, free = sum(entry.size for entry in wanted.values()), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DoesNotFit(f"{bucket.place} takes {needed / GIB:.1f} GiB and {folder.parent} has {free / GIB:.1f} GiB "
                         "free: type storage.cache=DIR on a larger disk")
    paths = {aside / (name or bucket.place.prefix.rpartition("/")[2]): (name, entry) for name, entry in wanted.items()}
    for _ in range(ROUNDS):
        with bucket.console.bar(f"from {bucket.place}", sum(len(entry.spans()) for entry in wanted.values())) as bar:
            bucket.each((work for path, (name, entry) in paths.items()
                         for work in _works(bucket, path, name, entry)), bar.tick)
        if all(_right(path, entry) for path, (_, entry) in paths.items()):
            break
    else:
        raise UserError(f"{bucket.place} did not arrive right several times: repeat the command, or the upload")
    for entry in [*paths, *(path for path in aside.rglob("*") if path.is_dir()), aside]:
        files.sync(entry)
    files.publish(aside, folder)


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

        def get() -> bytes:
            answer = bucket.s3.get_object(**bucket.where(name), Range=f"bytes={start}-{start + size - 1}")
            body: bytes = answer["Body"].read()
            return body

        body = bucket.call("s3:GetObject", name, get)
        if sha256(body).hexdigest() == digest:  # else the next round tries again
            os.pwrite(file.fileno(), body, start)


def _stream(bucket: Bucket, path: Path, name: str, entry: Entry) -> None:
    """Fetch an object without a manifest; what S3 knows of its content is checked: SHA-256, or the MD5 in its tag."""
    if path.is_file():
        return

    def get() -> None:
        answer = bucket.s3.get_object(**bucket.where(name), IfMatch=entry.tag, ChecksumMode="ENABLED")
        sums, length = (sha256(), md5(usedforsecurity=False)), 0
        with files.whole_file(path) as aside, aside.open("wb") as file:
            for block in answer["Body"].iter_chunks(BLOCK):
                file.write(block)
                length += len(block)
                for total in sums:
                    total.update(block)
            said, tag = answer.get("ChecksumSHA256", "-"), entry.tag.strip('"')
            plain = "-" not in tag and "kms" not in answer.get("ServerSideEncryption", "")
            wrong = length != entry.size or ("-" not in said and said != b64encode(sums[0].digest()).decode())
            if wrong or (plain and len(tag) == 32 and tag != sums[1].hexdigest()):
                raise ConnectionError(f"{name} arrived damaged")

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
