"""Uploads a folder to S3: sends the missing files, verifies every object, and uploads the manifest last."""

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

ROUNDS = 3  # attempts to send missing files


class DestinationOccupied(UserError):
    """Raised if the S3 destination already has content that differs from the folder to upload.

    This content is a complete folder, or the files of an aborted upload.
    """


def upload_entries(bucket: Bucket, entries: Entries, folder: Path) -> None:
    """Upload those files of a local folder that `entries` lists, and then the manifest.

    Raises:
        UserError: S3 rejects a file, or accepts it but does not have it afterwards.
        DestinationOccupied: `bucket` has a manifest that differs from `entries`, or an object that differs from its
            entry.
    """
    existing = bucket.read_manifest()
    if existing is not None and existing != entries:
        raise DestinationOccupied(f"{bucket.location} already holds another complete upload, which is never replaced: "
                                  "type another S3 address")
    missing = _missing_entries(bucket, entries)
    for _ in range(ROUNDS):
        if not missing:
            break
        _upload_files(bucket, folder, missing)
        missing = _missing_entries(bucket, entries)
    if missing:
        raise UserError(f"S3 accepted {', '.join(sorted(missing)[:3])} for {bucket.location} but does not have them: "
                        "repeat the command")
    text = manifest.serialize(entries)
    manifest_entry = Entry(len(text), (sha256(text).hexdigest(),))
    _put(bucket, manifest.NAME, text, manifest_entry)
    if not bucket.holds(manifest.NAME, manifest_entry):
        raise DestinationOccupied(f"another upload to {bucket.location} was completed meanwhile: type another S3 "
                                  "address")


def _missing_entries(bucket: Bucket, entries: Entries) -> Entries:
    missing, other = bucket.compare(entries)
    if other:
        raise DestinationOccupied(f"{bucket.location} has other content as {', '.join(sorted(other)[:3])}, and an "
                                  "upload never replaces objects: type another S3 address")
    return missing


def _upload_files(bucket: Bucket, folder: Path, missing: Entries) -> None:
    """Upload the files that `missing` lists: first the large files, in parts, and then the small files in parallel.

    If two machines compute the same run, their large files are equal, but some small files differ. An upload never
    replaces an object. A small file that an interrupted upload left in S3 would therefore block the upload of the other
    machine. To make this unlikely, the small files are sent last and within a short time.
    """
    with bucket.console.bar(f"to {bucket.location}", sum(len(entry.parts) for entry in missing.values())) as bar:
        small = [name for name, entry in missing.items() if len(entry.parts) == 1]
        for name in sorted(missing.keys() - small):
            _upload_in_parts(bucket, folder / name, name, missing[name], bar.tick)
        bucket.run_all(
            (partial(_upload_small_file, bucket, folder / name, name, missing[name]) for name in small), bar.tick)


def _upload_small_file(bucket: Bucket, path: Path, name: str, entry: Entry) -> None:
    _put(bucket, name, path.read_bytes(), entry)


def _put(bucket: Bucket, name: str, body: bytes, entry: Entry) -> None:
    checksum = _checksum_arguments(name, body, entry.parts[0])
    _create_object(bucket, name, partial(
        bucket.s3.put_object, **bucket.object_arguments(name), Body=body, **checksum))


def _create_object(bucket: Bucket, name: str, call: Callable[..., object]) -> None:
    """Create the object `name`, unless it exists.

    An existing object is not an error: an earlier attempt may have created it although the response was lost. The
    caller compares all objects with the manifest entries after all files have been sent.
    """
    def create() -> None:
        try:
            call(IfNoneMatch="*")
        except Exception as error:
            if aws_errors.error_code(error) not in {*aws_errors.PRECONDITION_FAILED, "NoSuchUpload"}:
                raise

    bucket.call("s3:PutObject", name, create)


def _upload_in_parts(bucket: Bucket, path: Path, name: str, entry: Entry, tick: Callable[[], None]) -> None:
    """Upload a large file in parts. Skip the parts that an earlier, unfinished upload has sent."""
    upload_id, sent = _find_or_create_upload(bucket, name, entry)
    arguments = bucket.object_arguments(name) | {"UploadId": upload_id}

    def upload_part(number: int, start: int, size: int) -> None:
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(size)
        checksum = _checksum_arguments(name, body, entry.parts[number - 1])
        response = bucket.call("s3:PutObject", name, lambda: bucket.s3.upload_part(
            **arguments, PartNumber=number, Body=body, **checksum))
        sent[number] = {"PartNumber": number, "ETag": response["ETag"], "ChecksumSHA256": checksum["ChecksumSHA256"]}

    numbered = list(enumerate(entry.spans(), 1))
    for number, _ in numbered:
        if number in sent:
            tick()
    bucket.run_all((partial(upload_part, number, *span) for number, span in numbered if number not in sent), tick)
    parts = [sent[number] for number in sorted(sent)]
    _create_object(bucket, name, partial(
        bucket.s3.complete_multipart_upload, **arguments, MultipartUpload={"Parts": parts}))


def _find_or_create_upload(bucket: Bucket, name: str, entry: Entry) -> tuple[str, dict[int, dict[str, Any]]]:
    """Find an unfinished multipart upload of the object, or create a multipart upload.

    An unfinished upload is used only if it has parts and all of its parts match `entry`.

    Returns:
        The ID of the multipart upload, and the parts that it already has, by part number.
    """
    arguments = bucket.object_arguments(name)
    uploads = bucket.call("s3:ListBucketMultipartUploads", name, lambda: bucket.s3.list_multipart_uploads(
        Bucket=bucket.location.bucket, Prefix=arguments["Key"]))
    expected = {number: _base64(part) for number, part in enumerate(entry.parts, 1)}
    for upload_id in (item["UploadId"] for item in uploads.get("Uploads", ()) if item["Key"] == arguments["Key"]):
        pages = bucket.s3.get_paginator("list_parts").paginate(**arguments, UploadId=upload_id)
        responses: list[dict[str, Any]] = bucket.call("s3:ListMultipartUploadParts", name, partial(list, pages))
        parts = [part for response in responses for part in response.get("Parts", ())]
        sent = {part["PartNumber"]: {key: part[key] for key in ("PartNumber", "ETag", "ChecksumSHA256")}
                for part in parts if part.get("ChecksumSHA256") == expected.get(part["PartNumber"], "")}
        if len(sent) == len(parts) > 0:
            return upload_id, sent
    created = bucket.call("s3:PutObject", name, lambda: bucket.s3.create_multipart_upload(
        **arguments, ChecksumAlgorithm="SHA256", ChecksumType="COMPOSITE"))
    return created["UploadId"], {}


def _base64(digest: str) -> str:
    return b64encode(bytes.fromhex(digest)).decode()


def _checksum_arguments(name: str, body: bytes, digest: str) -> dict[str, str]:
    """Return the arguments of an S3 call that cause S3 to verify the body and to store its SHA-256.

    Raises:
        UserError: the SHA-256 of the body is not `digest`, so the local file has changed.
    """
    if sha256(body).hexdigest() != digest:
        raise UserError(f"{name} changed while it was uploaded: repeat the command")
    return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": _base64(digest)}
