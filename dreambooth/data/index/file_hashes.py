"""The SHA-256 of photos and captions, remembered so that an unchanged file is read once. Imports no torch.

A file counts as unchanged if its size, its device, its inode and the times of its last changes of content (mtime) and
of status (ctime) are the same. Programs can set back mtime, but not ctime.
"""

import hashlib
import os
import stat
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dreambooth.data import captions, color_profiles, image_formats
from dreambooth.data.index.ordered_map import ordered_map
from dreambooth.data.index.records import FOLDER, Records
from dreambooth.data.photos import list_photos
from dreambooth.errors import UserError

FORMAT = 2  # of the stored entries; raise it when `color_profiles.is_converted` changes
NO_FINGERPRINT = "0" * 64  # fingerprint of a folder that has no photos, or an unreadable file
MIN_AGE = 2.0  # seconds; a file that changed less long ago may change again without another time
MIN_BYTES = 64 * 2**20  # fewer bytes are hashed again in less time than a user notices


class FileHash(NamedTuple):
    """What is known about the content of a file."""

    sha256: str  # hex
    converted: bool  # whether it is a photo that is converted to sRGB, see `color_profiles.is_converted`


class FileHashes:
    """Hashes of files, in memory and, if many bytes were read for them, in a file."""

    def __init__(self, folder: Path | None) -> None:
        """Args:
            folder: the run root, whose folder `photo_index` holds the file; None: the hashes are only in memory.
        """
        self._records = Records(folder / FOLDER / "files.jsonl" if folder else None)
        self._read_bytes = 0

    def of(self, path: Path) -> FileHash:
        """Return the hash of a file, which is read unless an earlier hash is known and the file is unchanged.

        Raises:
            OSError: the path is not a file (a broken link, or a pipe, which would block), or it cannot be read.
        """
        now, key = time.time(), str(path.absolute())
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path} is not a file")
            state = [FORMAT, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
            with suppress(TypeError, ValueError):
                *earlier, decoders, digest, converted = self._records.get(key)
                if earlier == state and (not decoders or decoders == image_formats.decoder_versions()):
                    return FileHash(digest, converted)
            content = file.read()
        digest, converted = hashlib.sha256(content).hexdigest(), color_profiles.is_converted(content)
        self._read_bytes += len(content)
        # A file that cannot be opened now may be one that can later, with another package.
        if max(status.st_mtime, status.st_ctime) < now - MIN_AGE and converted is not None:
            decoders = image_formats.decoder_versions() if color_profiles.has_mark(content) else ""
            self._records.add(key, [*state, decoders, digest, converted])
        return FileHash(digest, bool(converted))

    def save(self) -> None:
        """Write the new hashes, if at least MIN_BYTES were read for them."""
        if self._read_bytes >= MIN_BYTES:
            self._records.save()


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file. If it is a pipe, do not wait for a program that writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@cache
def open_hashes(folder: Path | None) -> FileHashes:
    """Return the hashes of a run root: one object per process, so that no file is read twice."""
    return FileHashes(folder)


def fingerprint(folder: Path, masks: bool = False, run_root: Path | None = None) -> str:
    """Return a hex SHA-256 over the names and the content of all photo and caption files of a folder. Never raises.

    The fingerprint does not depend on the path of the folder. If the folder has no photos, or if one of the photo and
    caption files cannot be read, the fingerprint is NO_FINGERPRINT. A photo that is converted to sRGB has another
    fingerprint than in earlier versions of this package, which did not convert it.

    Args:
        masks: whether the images are masks, which are not converted.
        run_root: the run root in which hashes of many bytes are stored for later commands; None: in memory only.
    """
    total = hashlib.sha256()
    try:
        hashes = open_hashes(run_root.absolute() if run_root else None)
        files = [(photo, path) for photo in list_photos(folder) for path in (photo, *captions.caption_files(photo))]
        paths = dict.fromkeys(path for _, path in files)  # each photo has the metadata file among its caption files
        found = dict(zip(paths, ordered_map(hashes.of, paths), strict=True))
        hashes.save()
    except (UserError, OSError):
        return NO_FINGERPRINT
    for photo, path in files:
        total.update(hashlib.sha256(os.fsencode(path.name)).digest() + bytes.fromhex(found[path].sha256))
        if path is photo and not masks and found[path].converted:
            total.update(hashlib.sha256(color_profiles.CONVERSION).digest())
    return total.hexdigest()


def conversion_mark(folder: Path) -> str:
    """Return a text that is added to the digest of a folder of photos in S3: "" if no photo is converted to sRGB."""
    hashes = open_hashes(None)
    return "-srgb" * any(found.converted for found in ordered_map(hashes.of, list_photos(folder)))
