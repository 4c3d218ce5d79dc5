"""Manifests: `dreambooth-manifest.json` records the size and the SHA-256 checksums of all files of a folder.

Checkpoints and exported models contain a manifest, with which `find_damage` finds files that have changed.

The manifest of an S3 folder is uploaded last, so a folder without a manifest is not complete. A download that differs
from the manifest is rejected. A file is divided into parts, and the manifest holds the SHA-256 of each part. S3 stores
a checksum that can be computed from these values (a SHA-256 additional checksum): for an object of one part, the
SHA-256 of the object; for an object of several parts, the SHA-256 of the concatenated SHA-256s of the parts.
"""

import json
import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth.errors import UserError
from dreambooth.utils import atomic_files

NAME = "dreambooth-manifest.json"
PART_SIZE = 16 * 2**20  # bytes; S3 allows 10,000 parts, so an object has at most 156 GiB
FORMAT = 1
THREADS = 4  # threads that hash the parts of one file


@dataclass(frozen=True)
class Entry:
    """Expected size and content of a file. If `parts` is empty, only the ETag from S3 identifies the content."""

    size: int
    parts: tuple[str, ...] = ()  # hex SHA-256 of each part
    etag: str = ""
    part_size: int = PART_SIZE

    def matches(self, size: int, checksum: str | None) -> bool | None:
        """Compare this entry with the size and checksum that S3 stores for an object.

        Args:
            checksum: S3's SHA-256 in base64, followed by "-" and the number of parts if the object has several parts.

        Returns:
            Whether the content is the same. None if this is unknown: S3 stores no SHA-256 of the object, or the stored
            SHA-256 was computed over parts that differ from the parts of this entry. This happens, for example, if
            another tool uploaded the object.
        """
        digests = [bytes.fromhex(part) for part in self.parts]
        total = digests[0] if len(digests) == 1 else sha256(b"".join(digests)).digest()
        stored, _, count = (checksum or "").partition("-")
        if size != self.size:
            return False
        if stored == b64encode(total).decode() and count in ("", str(len(digests))):
            return True
        return False if stored and count == (str(len(digests)) if len(digests) > 1 else "") else None

    def spans(self) -> list[tuple[int, int]]:
        """Return the (offset, length) of every part of the file. An empty file has one part."""
        if not self.size:
            return [(0, 0)]
        return [(start, min(self.part_size, self.size - start)) for start in range(0, self.size, self.part_size)]


Entries = dict[str, Entry]  # the key is the path relative to the folder, with forward slashes


def hash_file(path: Path, part_size: int | None = None) -> Entry:
    """Compute the manifest entry of a local file: the size, and the checksum of each part. Threads hash the parts.

    Args:
        part_size: bytes per part; None: PART_SIZE.
    """
    with path.open("rb") as file:
        entry = Entry(os.fstat(file.fileno()).st_size, part_size=part_size or PART_SIZE)

        def hash_part(span: tuple[int, int]) -> str:
            start, size = span
            return sha256(os.pread(file.fileno(), size, start)).hexdigest()

        spans = entry.spans()
        if len(spans) == 1:
            return replace(entry, parts=(hash_part(spans[0]),))
        with ThreadPoolExecutor(THREADS, thread_name_prefix="hash") as pool:
            return replace(entry, parts=tuple(pool.map(hash_part, spans)))


def hash_folder(folder: Path, only: Sequence[str] = ()) -> Entries:
    """Compute the manifest entry of every file below a folder, except the manifest itself and temporary files.

    Args:
        only: names of the files and subfolders to include; empty: include everything.

    Raises:
        UserError: there are no files to include.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME
                   and not any(part.startswith(atomic_files.TEMPORARY_PREFIX)
                               for part in path.relative_to(folder).parts))
    entries = {path.relative_to(folder).as_posix(): hash_file(path) for path in paths
               if not only or path.relative_to(folder).parts[0] in only}
    if not entries:
        raise UserError(f"there is nothing to upload in {folder}: type another folder")
    return entries


def digest(entries: Mapping[str, Entry]) -> str:
    """Return a hash of ten hex digits over the names and contents of all files."""
    content = [[name, entry.size, entry.parts or entry.etag] for name, entry in sorted(entries.items())]
    return sha256(json.dumps(content).encode()).hexdigest()[:10]


def serialize(entries: Mapping[str, Entry]) -> bytes:
    """Return the content of a manifest file as JSON bytes."""
    files = {name: {"size": entry.size, "part_size": entry.part_size, "sha256": entry.parts}
             for name, entry in sorted(entries.items())}
    return (json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n").encode()


def parse(text: bytes, where: str) -> Entries:
    """Parse the content of a manifest file.

    Args:
        where: the address of the folder, for error messages.

    Raises:
        UserError: this version of dreambooth cannot read the manifest, or the manifest names a file outside its folder.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, this version reads {FORMAT}")
        return {check_name(name, where): _parse_entry(item) for name, item in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}/{NAME} cannot be read ({error}): upload the folder again") from error


def _parse_entry(item: dict[str, Any]) -> Entry:
    entry = Entry(int(item["size"]), tuple(item["sha256"]), part_size=int(item["part_size"]))
    if entry.size < 0 or entry.part_size < 1 or len(entry.parts) != max(1, -(-entry.size // entry.part_size)) \
            or not all(re.fullmatch("[0-9a-f]{64}", part) for part in entry.parts):
        raise ValueError(f"{len(entry.parts)} SHA-256 do not fit {entry.size} bytes in parts of {entry.part_size}")
    return entry


def check_name(name: str, where: str) -> str:
    """Check that a file name in a manifest is inside the folder of the manifest, and return the name unchanged.

    Raises:
        UserError: the file name leads out of the folder.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{where} contains the name {name!r}, which is outside its folder: give the object another "
                        "name")
    return name


def write(folder: Path, entries: Entries | None = None) -> None:
    """Write a manifest into a local folder, for example one that SageMaker uploads as a job's output.

    Args:
        entries: the entries of the manifest; None: the files of the folder are hashed.
    """
    with atomic_files.write_file(folder / NAME) as temporary:
        temporary.write_bytes(serialize(entries or hash_folder(folder)))


@contextmanager
def write_folder(path: Path, fresh: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill. After the block, add a manifest, and replace `path` with this folder.

    The files are hashed while they are synced to disk, so that the checksums add no time on an ordinary disk.

    Args:
        fresh: whether `path` must be missing or an empty folder, so that no files are replaced.
    """
    with atomic_files.write_folder(path, fresh, (NAME, lambda folder: serialize(hash_folder(folder)))) as temporary:
        yield temporary


def read(folder: Path) -> Entries | None:
    """Return the entries of the manifest in a local folder, or None if there is no manifest.

    Raises:
        UserError: the manifest is damaged.
    """
    try:
        return parse((folder / NAME).read_bytes(), str(folder))
    except FileNotFoundError:
        return None


def find_damage(folder: Path, contents: bool = True, counts: Callable[[str], bool] = lambda name: True) -> str | None:
    """Compare the files of a folder with its manifest.

    Args:
        contents: whether to read and hash the files; False: compare only their sizes, which takes no time.
        counts: returns whether a file is compared; its argument is the name of the file in the manifest.

    Returns:
        A description of the first difference, or None if there is no difference or no manifest.

    Raises:
        PermissionError: this user may not read a file, which may well be intact.
    """
    try:
        for name, entry in (read(folder) or {}).items():
            if not counts(name):
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != entry.size:
                return f"{name} has another size"
            if contents and hash_file(folder / name, entry.part_size) != entry:
                return f"{name} has other content"
    except UserError:
        return f"{NAME} cannot be read"
    except PermissionError:
        raise
    except OSError as error:
        return str(error)
    return None
