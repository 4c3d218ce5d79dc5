"""Keeps the pixels of decoded photos: in memory up to a limit, and then in a temporary file.

The file has no name, so that it disappears with the process, even if the process is killed. It is read, not mapped:
the pixels of a photo are in memory only while they are used.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dreambooth.utils import atomic_files

MEMORY_LIMIT = 512 * 2**20  # bytes; about 500 photos at 512 px

Pixels = NDArray[np.uint8]


class StoredPixels:
    """Pixels that are outside memory. Indexing reads them, as with an array of h5py: `stored[:64, :64]`."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[], Pixels]) -> None:
        """Args:
            shape: (H, W, 3) of a photo, (H, W) of a mask.
            read: returns all pixels; called each time that they are needed.
        """
        self.shape = shape
        self._read = read

    def __getitem__(self, key: Any) -> Pixels:
        pixels: Pixels = self._read()[key]
        return pixels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._read() if dtype is None else self._read().astype(dtype)

    def tobytes(self) -> bytes:
        """Return the bytes of all pixels, as those of an array."""
        return self._read().tobytes()


class PixelStore:
    """Stores arrays of pixels. Several threads may use it."""

    def __init__(self, folder: Path | None, limit: int | None = None) -> None:
        """Args:
            folder: the folder of the temporary file, created when it is needed; None: that of the system.
            limit: bytes that are kept in memory; None: MEMORY_LIMIT.
        """
        self._folder, self._limit = folder, MEMORY_LIMIT if limit is None else limit
        self._in_memory = 0
        self._file: IO[bytes] | None = None
        self._end = 0
        self._lock = threading.Lock()

    def put(self, pixels: Pixels) -> Pixels | StoredPixels:
        """Return the pixels themselves if the limit allows it, and otherwise StoredPixels that read them from the file.

        Raises:
            DoesNotFit: the disk is full.
            UserError: the file cannot be written.
        """
        with self._lock:
            if self._in_memory + pixels.nbytes <= self._limit:
                self._in_memory += pixels.nbytes
                return pixels
            offset, self._end = self._end, self._end + pixels.nbytes
            descriptor = self._open()
        shape, data = pixels.shape, np.ascontiguousarray(pixels).reshape(-1).data
        try:
            written = 0
            while written < len(data):  # a write may be partial
                written += os.pwrite(descriptor, data[written:], offset + written)
        except OSError as error:
            raise self._failure(error) from error
        return StoredPixels(shape, partial(self._read, offset, shape))

    def _read(self, offset: int, shape: tuple[int, ...]) -> Pixels:
        return np.frombuffer(os.pread(self._open(), math.prod(shape), offset), np.uint8).reshape(shape)

    def _open(self) -> int:
        if self._file is None:
            try:
                if self._folder:
                    self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open until the process ends
            except OSError as error:
                raise self._failure(error) from error
        return self._file.fileno()

    def _failure(self, error: OSError) -> Exception:
        return atomic_files.write_failure(f"the decoded photos in {self._folder or tempfile.gettempdir()}", error,
                                          "type run_root=DIR, a folder that you can write to")
