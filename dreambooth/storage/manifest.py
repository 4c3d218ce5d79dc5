"""What a complete folder in S3 holds: every file's size and SHA-256, part by part, in `dreambooth-manifest.json`.

The manifest is written last, so a folder without one is not complete, and a reader that finds other bytes than it names
takes none of them. Checksums are those that S3 keeps itself (SHA-256 additional checksums), so that both sides compare
the same numbers: of one part, its SHA-256; of several, the SHA-256 of their SHA-256s.
"""

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from dreambooth.errors import UserError
from dreambooth.utils import atomic_files

NAME = "dreambooth-manifest.json"
PART = 16 * 2**20  # bytes of a part; S3 takes 10,000 parts an object: 156 GiB
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A file as it must be. No parts: its SHA-256 is not known, only `tag`, the ETag that S3 gave it."""

    size: int
    parts: tuple[str, ...] = ()  # hex SHA-256 of every PART bytes
    tag: str = ""
    part_size: int = PART

    def is_in(self, size: int, checksum: str | None) -> bool | None:
        """Whether this is what S3 says that it holds: base64, with the number of parts if there are several. None: it
        keeps no SHA-256 of these parts, as of what other tools put there."""
        digests = [bytes.fromhex(part) for part in self.parts]
        whole = digests[0] if len(digests) == 1 else sha256(b"".join(digests)).digest()
        said, _, count = (checksum or "").partition("-")
        if size != self.size:
            return False
        if said == b64encode(whole).decode() and count in ("", str(len(digests))):
            return True
        return False if said and count == (str(len(digests)) if len(digests) > 1 else "") else None

    def spans(self) -> list[tuple[int, int]]:
        """(offset, length) of every part; an empty file has one."""
        if not self.size:
            return [(0, 0)]
        return [(start, min(self.part_size, self.size - start)) for start in range(0, self.size, self.part_size)]


Entries = dict[str, Entry]  # path below the folder, with forward slashes -> file


def of_file(path: Path) -> Entry:
    """Size and checksums of a local file."""
    parts: list[str] = []
    size = 0
    with path.open("rb") as file:
        while (block := file.read(PART)) or not parts:
            parts.append(sha256(block).hexdigest())
            size += len(block)
    return Entry(size, tuple(parts), part_size=PART)


def of_folder(folder: Path, only: Sequence[str] = ()) -> Entries:
    """Every file below a folder but the manifest and what is still being written.

    Args:
        only: names right below the folder; empty: all of them.

    Raises:
        UserError: there is nothing in it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME
                   and not any(part.startswith(atomic_files.ASIDE) for part in path.relative_to(folder).parts))
    found = {path.relative_to(folder).as_posix(): of_file(path) for path in paths
             if not only or path.relative_to(folder).parts[0] in only}
    if not found:
        raise UserError(f"there is nothing to upload in {folder}: type another folder")
    return found


def digest(entries: Mapping[str, Entry]) -> str:
    """Ten hex digits that change when a name or a byte does."""
    told = [[name, entry.size, entry.parts or entry.tag] for name, entry in sorted(entries.items())]
    return sha256(json.dumps(told).encode()).hexdigest()[:10]


def dumped(entries: Mapping[str, Entry]) -> bytes:
    """The manifest's text."""
    listed = {name: {"size": entry.size, "part_size": entry.part_size, "sha256": entry.parts}
              for name, entry in sorted(entries.items())}
    return (json.dumps({"format": FORMAT, "files": listed}, indent=1) + "\n").encode()


def parsed(text: bytes, where: str) -> Entries:
    """A manifest's entries.

    Raises:
        UserError: it is no manifest that this version reads, or names a file outside its folder.
    """
    try:
        told = json.loads(text)
        if told["format"] != FORMAT:
            raise ValueError(f"it has format {told['format']}, this version reads {FORMAT}")
        return {safe(name, where): _entry(item) for name, item in told["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}/{NAME} cannot be read ({error}): upload the folder again") from error


def _entry(item: dict[str, Any]) -> Entry:
    entry = Entry(int(item["size"]), tuple(item["sha256"]), part_size=int(item["part_size"]))
    if entry.size < 0 or entry.part_size < 1 or len(entry.parts) != max(1, -(-entry.size // entry.part_size)) \
            or not all(re.fullmatch("[0-9a-f]{64}", part) for part in entry.parts):
        raise ValueError(f"{len(entry.parts)} SHA-256 do not fit {entry.size} bytes in parts of {entry.part_size}")
    return entry


def safe(name: str, where: str) -> str:
    """The name, if it stays inside the folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{where} holds the name {name!r}, which leads out of its folder: give the object another name")
    return name


def write(folder: Path) -> None:
    """Put a manifest into a local folder that something else will copy to S3, such as SageMaker its output."""
    with atomic_files.whole_file(folder / NAME) as aside:
        aside.write_bytes(dumped(of_folder(folder)))
