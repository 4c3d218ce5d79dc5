"""Up to S3: what is missing is sent, everything is asked for again, the manifest comes last."""

from base64 import b64encode
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.storage import aws_errors, manifest
from dreambooth.storage.manifest import Entries, Entry
from dreambooth.storage.s3_bucket import Bucket

ROUNDS = 3  # of sending what S3 does not hold


class Taken(UserError):
    """Something else is where this was to go, and it is not complete: an upload that was never finished, perhaps."""


def send(bucket: Bucket, entries: Entries, folder: Path) -> None:
    """Make these files of a folder complete in S3.

    Raises:
        UserError: S3 does not take or keep it, or another complete folder is there, which is never replaced.
        Taken: there is no complete folder, but a file with other bytes.
    """
    kept = bucket.kept()
    if kept is not None and kept != entries:
        raise UserError(f"{bucket.place} holds another complete upload, and none is ever replaced: type another place")
    missing = _lacking(bucket, entries)
    for _ in range(ROUNDS):
        if not missing:
            break
        _send_all(bucket, folder, missing)
        missing = _lacking(bucket, entries)
    if missing:
        raise UserError(f"{bucket.place} took {', '.join(sorted(missing)[:3])} and does not hold it: repeat the "
                        "command")
    text = manifest.dumped(entries)
    told = Entry(len(text), (sha256(text).hexdigest(),))
    _put(bucket, manifest.NAME, text, told)
    if not bucket.holds(manifest.NAME, told):
        raise UserError(f"somebody else has completed {bucket.place} meanwhile: type another place")


def _lacking(bucket: Bucket, entries: Entries) -> Entries:
    """What S3 does not hold."""
    missing, other = bucket.compared(entries)
    if other:
        raise Taken(f"{bucket.place} holds something else as {', '.join(sorted(other)[:3])}, and nothing there is ever "
                    "replaced: type another place")
    return missing


def _send_all(bucket: Bucket, folder: Path, missing: Entries) -> None:
    """The small files last: of a run they are what differs from machine to machine, and sending them takes no time in
    which to be stopped and leave them in the way of another machine."""
    with bucket.console.bar(f"to {bucket.place}", sum(len(entry.parts) for entry in missing.values())) as bar:
        small = [name for name, entry in missing.items() if len(entry.parts) == 1]
        for name in sorted(missing.keys() - small):
            _send_parts(bucket, folder / name, name, missing[name], bar.tick)
        bucket.each((partial(_send_small, bucket, folder / name, name, missing[name]) for name in small), bar.tick)


def _send_small(bucket: Bucket, path: Path, name: str, entry: Entry) -> None:
    _put(bucket, name, path.read_bytes(), entry)


def _put(bucket: Bucket, name: str, body: bytes, entry: Entry) -> None:
    checked = _checked(name, body, entry.parts[0])
    _new(bucket, name, partial(bucket.s3.put_object, **bucket.where(name), Body=body, **checked))


def _new(bucket: Bucket, name: str, call: Callable[..., object]) -> None:
    """Make an object that is not there. One that is stays as it is, and is looked at when all is sent: it may be ours,
    from an attempt whose answer was lost."""
    def make() -> None:
        try:
            call(IfNoneMatch="*")
        except Exception as error:
            if aws_errors.code(error) not in {*aws_errors.CHANGED, "NoSuchUpload"}:
                raise

    bucket.call("s3:PutObject", name, make)


def _send_parts(bucket: Bucket, path: Path, name: str, entry: Entry, tick: Callable[[], None]) -> None:
    """A large file, going on with the parts that an earlier, unfinished upload left."""
    upload, sent = _begun(bucket, name, entry)
    where = bucket.where(name) | {"UploadId": upload}

    def part(number: int, start: int, size: int) -> None:
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(size)
        checked = _checked(name, body, entry.parts[number - 1])
        answer = bucket.call("s3:PutObject", name, lambda: bucket.s3.upload_part(
            **where, PartNumber=number, Body=body, **checked))
        sent[number] = {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checked["ChecksumSHA256"]}

    numbered = list(enumerate(entry.spans(), 1))
    for number, _ in numbered:
        if number in sent:
            tick()
    bucket.each((partial(part, number, *span) for number, span in numbered if number not in sent), tick)
    parts = [sent[number] for number in sorted(sent)]
    _new(bucket, name, partial(bucket.s3.complete_multipart_upload, **where, MultipartUpload={"Parts": parts}))


def _begun(bucket: Bucket, name: str, entry: Entry) -> tuple[str, dict[int, dict[str, Any]]]:
    """An unfinished upload of the object with the parts of it that are right; a new one if there is none."""
    where = bucket.where(name)
    found = bucket.call("s3:ListBucketMultipartUploads", name, lambda: bucket.s3.list_multipart_uploads(
        Bucket=bucket.place.bucket, Prefix=where["Key"]))
    right = {number: _base64(part) for number, part in enumerate(entry.parts, 1)}
    for upload in (item["UploadId"] for item in found.get("Uploads", ()) if item["Key"] == where["Key"]):
        pages = bucket.s3.get_paginator("list_parts").paginate(**where, UploadId=upload)
        answers: list[dict[str, Any]] = bucket.call("s3:ListMultipartUploadParts", name, partial(list, pages))
        parts = [part for answer in answers for part in answer.get("Parts", ())]
        sent = {part["PartNumber"]: {key: part[key] for key in ("PartNumber", "ETag", "ChecksumSHA256")}
                for part in parts if part.get("ChecksumSHA256") == right.get(part["PartNumber"], "")}
        if len(sent) == len(parts) > 0:
            return upload, sent
    begun = bucket.call("s3:PutObject", name, lambda: bucket.s3.create_multipart_upload(
        **where, ChecksumAlgorithm="SHA256", ChecksumType="COMPOSITE"))
    return begun["UploadId"], {}


def _base64(digest: str) -> str:
    return b64encode(bytes.fromhex(digest)).decode()


def _checked(name: str, body: bytes, digest: str) -> dict[str, str]:
    """Arguments by which S3 refuses other bytes than these, and keeps their SHA-256.

    Raises:
        UserError: they are not what the manifest will say.
    """
    if sha256(body).hexdigest() != digest:
        raise UserError(f"{name} has changed while it was sent: repeat the command")
    return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": _base64(digest)}
