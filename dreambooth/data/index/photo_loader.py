"""Loads the photos of a run: each is decoded once, in threads, and their pixels do not stay in memory.

With latents on disk, what a run needs to know about a photo is stored in the run root, under the content of the photo's
file. A later run with the same photos then decodes none of them, unless their pixels are needed after all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreambooth.config.dataset import ALPHA
from dreambooth.data import image_formats, masks, photo_checks
from dreambooth.data.index.file_hashes import open_hashes
from dreambooth.data.index.ordered_map import ordered_map
from dreambooth.data.index.pixel_store import Pixels, PixelStore, StoredPixels
from dreambooth.data.index.records import FOLDER, Records
from dreambooth.data.photos import Facts, Photo, load_photo
from dreambooth.errors import UserError

FORMAT = 2  # of the records; raise it when the code decodes other pixels or measures other facts
SAVE_EVERY = 256  # photos; a killed process decodes at most so many again


class Request(NamedTuple):
    """One image, and how it is loaded. The fields are arguments of `load_photos`."""

    path: Path
    resolution: int
    bucketed: bool
    mask: str | None


class PhotoLoader:
    """Loads photos as `load_photos` needs it, see `photos.Load`. A photo that is loaded twice is decoded once."""

    def __init__(self, run_root: Path | None = None, saved: bool = False, memory_limit: int | None = None,
                 threads: int | None = None, writes: bool = True) -> None:
        """Args:
            run_root: the folder of the temporary file of pixels, and of the records; None: that of the system.
            saved: whether the facts about photos are stored in `run_root`, and read from there.
            memory_limit: bytes of pixels that are kept in memory, see PixelStore.
            threads: number of threads, see `ordered_map`.
            writes: whether new facts are stored; of the processes of a host, one does.
        """
        self._store = PixelStore(run_root, memory_limit)
        self._threads, self._writes = threads, writes
        self._hashes = open_hashes(run_root) if run_root and saved else None
        self._format = f"{FORMAT}, {image_formats.decoder_versions()}"
        self._records = Records(run_root / FOLDER / "decoded.jsonl", self._format) if run_root and saved else None
        self._loaded: dict[Request, Photo] = {}

    def __call__(self, paths: Sequence[Path], resolution: int, bucketed: bool = False,
                 mask: str | None = None) -> Iterator[tuple[Photo | None, list[str]]]:
        """Yield each photo without its caption, or None and why it cannot be used, in the order of `paths`."""
        requests = [Request(path, resolution, bucketed, mask) for path in paths]
        for number, (request, (photo, problems, key)) in enumerate(
                zip(requests, ordered_map(self._load, requests, self._threads), strict=True), start=1):
            if photo is not None and request not in self._loaded:
                self._loaded[request] = photo = self._keep(photo)
                if key and self._records and photo.facts:
                    self._records.add(key, _to_record(photo))
            yield self._loaded.get(request), problems
            if number % SAVE_EVERY == 0 or number == len(requests):
                self._save()

    def _save(self) -> None:
        if self._writes and self._records and self._hashes:
            self._records.save()
            self._hashes.save()

    def _load(self, request: Request) -> tuple[Photo | None, list[str], str | None]:
        """Load one photo in a thread. Return the photo, its problems, and the key of a new record; None: no record."""
        if request in self._loaded:
            return self._loaded[request], [], None
        key = self._key(request)
        if key and (photo := self._from_record(request, key)):
            return photo, [], None
        problems: list[str] = []
        photo = load_photo(request.path, request.resolution, problems, request.bucketed, request.mask)
        if photo is None:
            return None, problems, None
        facts = photo_checks.measure(photo, request.resolution)
        known = facts.hash is not None or not facts.contrast  # unknown without the package imagehash
        return replace(photo, facts=facts), [], key if known and self._key(request) == key else None

    def _keep(self, photo: Photo) -> Photo:
        """Return a photo whose pixels are in the store."""
        if isinstance(photo.pixels, StoredPixels):
            return photo
        mask = None if photo.mask is None else self._store.put(np.asarray(photo.mask))
        return replace(photo, pixels=self._store.put(photo.pixels), mask=mask)

    def _key(self, request: Request) -> str | None:
        """Return the key of a photo's record: everything that determines its pixels. None: there are no records."""
        if self._hashes is None:
            return None
        with suppress(OSError):  # load_photo says what is wrong
            mask = request.mask if request.mask in (None, ALPHA) else "none"
            if path := masks.mask_file(request.path, request.mask):
                mask = self._hashes.of(path).sha256
            return (f"{self._hashes.of(request.path).sha256}{request.path.suffix.lower()} {request.resolution} "
                    f"{request.bucketed} {mask} {self._format}")
        return None

    def _from_record(self, request: Request, key: str) -> Photo | None:
        """Return a photo that is decoded only if its pixels are read. None: there is no intact record."""
        with suppress(TypeError, KeyError, ValueError):
            record: Any = self._records.get(key) if self._records else None
            height, width = record["pixels"]
            facts = Facts(**record["facts"])
            deferred = _Deferred(self._store, request, facts.digest, lambda: self._key(request) == key)
            return Photo(request.path, StoredPixels((height, width, 3), deferred.pixels), "",
                         tuple(record["size"]) if record["size"] else None,
                         StoredPixels((height, width), deferred.mask) if request.mask else None,
                         tuple(record["original"]), tuple(record["remarks"]), facts)
        return None


def _to_record(photo: Photo) -> dict[str, Any]:
    assert photo.facts is not None
    return {"pixels": photo.pixels.shape[:2], "size": photo.size, "original": photo.original_size,
            "remarks": photo.remarks, "facts": asdict(photo.facts)}


class _Deferred:
    """Pixels and mask of one photo, decoded when one of them is read for the first time."""

    def __init__(self, store: PixelStore, request: Request, digest: str, is_unchanged: Callable[[], bool]) -> None:
        """Args:
            store: receives the pixels and the mask.
            digest: of the pixels, according to the record.
            is_unchanged: returns whether the files of the photo and its mask are still those of the record.
        """
        self._store, self._request, self._digest, self._is_unchanged = store, request, digest, is_unchanged
        self._lock = threading.Lock()
        self._kept: tuple[Pixels | StoredPixels, Pixels | StoredPixels | None] | None = None

    def pixels(self) -> Pixels:
        """Return the pixels.

        Raises:
            UserError: a file has changed or cannot be read any more, or the record is wrong.
        """
        return np.asarray(self._read()[0])

    def mask(self) -> Pixels:
        """Return the mask. Raises as `pixels`."""
        return np.asarray(self._read()[1])

    def _read(self) -> tuple[Pixels | StoredPixels, Pixels | StoredPixels | None]:
        with self._lock:
            if self._kept is None:
                photo = self._decode()
                mask = None if photo.mask is None else self._store.put(np.asarray(photo.mask))
                self._kept = self._store.put(np.asarray(photo.pixels)), mask
            return self._kept

    def _decode(self) -> Photo:
        problems: list[str] = []
        path, resolution, bucketed, mask = self._request
        photo = load_photo(path, resolution, problems, bucketed, mask)
        if photo is None:
            raise UserError(f"{path} cannot be used any more ({problems[0]}): restore the file, or repeat the command "
                            "to start a run without it")
        if not self._is_unchanged():
            files = f"{path}, or its mask," if mask not in (None, ALPHA) else str(path)
            raise UserError(f"{files} has changed since the run read it: restore the file, or repeat the command to "
                            "start a run with the new one")
        if photo.digest != self._digest:
            raise UserError(f"{path} is decoded to other pixels than the folder {FOLDER} in run_root says: remove this "
                            "folder, and repeat the command")
        return photo
