"""Storage for cached latents: on the device, in host memory, or in files on disk that later runs reuse.

The cache holds the moments (mean and standard deviation) of the latent distribution of an image, not sampled latents.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dreambooth.config.enums import LatentCache
from dreambooth.utils import atomic_files

log = logging.getLogger(__name__)
CHECKSUM = "sha256"  # key of a cache file's metadata: a hash of the moments
CHUNK = 64  # number of rows that are hashed together
FILE_PIXELS, FILE_ROWS = 2**26, 256  # a cache file holds the moments of at most so many pixels and images
Moments = tuple[Tensor, Tensor]  # mean and standard deviation of the latents, (N, C, h, w) each
ReadRows = Callable[[list[int]], Moments]  # takes row numbers, returns the moments of these rows on LatentStore.device


@dataclass(frozen=True)
class LatentStore:
    """Stores the latent moments (mean and standard deviation) of a set of images, one row per image.

    The name of a cache file is a hash of the content and size of its images, in order, and of the weights of the VAE
    encoder. A different photo, crop or VAE therefore gives a different file, and runs with the same images and VAE
    share files. Many images are in several files. Each is written as soon as its images are encoded, so that memory
    does not grow with the number of images, and a killed run encodes only the images of unwritten files again.
    """

    where: LatentCache = LatentCache.device
    device: torch.device | None = None  # device to which rows are copied when read; None: not copied
    folder: Path | None = None  # folder of the cache files; used only with LatentCache.disk
    encoder: str = ""  # result of `digest` for the VAE encoder

    def __call__(self, size: str, content: Sequence[str], encode_chunks: Callable[[range], Iterator[Moments]],
                 file_rows: int) -> ReadRows:
        """Store the moments of one set of images, and return a function that reads selected rows.

        Args:
            size: text that identifies the size of the images.
            content: strings that identify the images, such as hashes of their pixels.
            encode_chunks: takes a range of rows, encodes their images and yields the moments in chunks. Not called for
                rows whose cache file exists.
            file_rows: number of rows per file, see `rows_per_file`.
        """
        if self.where is LatentCache.disk and self.folder is not None:
            if len(content) > file_rows and (path := self._path(size, content)).is_file():
                if _is_intact(path):
                    file_rows = len(content)  # one file, by an earlier version of this package
                else:
                    path.unlink(missing_ok=True)  # it is not written again, and would give a warning at every start
            paths = []
            for start in range(0, len(content), file_rows):
                rows = range(start, min(start + file_rows, len(content)))
                paths.append(path := self._path(size, content[start:rows.stop]))
                if not _is_intact(path):
                    _write(path, *_concatenate(encode_chunks(rows), torch.device("cpu"), len(rows)))
            return lambda rows: _read_rows(paths, file_rows, rows, self.device)
        device = torch.device("cpu") if self.where is LatentCache.cpu else None
        mean, std = _concatenate(encode_chunks(range(len(content))), device, len(content))
        return lambda rows: (mean[rows].to(self.device), std[rows].to(self.device))

    def _path(self, size: str, content: Sequence[str]) -> Path:
        assert self.folder is not None
        name = sha256("\n".join([self.encoder, size, *content]).encode()).hexdigest()[:20]
        return self.folder / f"{name}.safetensors"


def rows_per_file(batch: int, resolution: int) -> int:
    """Return the number of images per cache file.

    It is a multiple of the batch, so that the images are encoded in the same batches, which determine the last bits of
    the moments, whether they are in one file or in several.

    Args:
        batch: number of images per call of the VAE.
        resolution: side of the square crop in pixels.
    """
    return batch * max(1, min(FILE_ROWS, FILE_PIXELS // resolution**2) // batch)


def digest(module: nn.Module) -> str:
    """Return a hex SHA-256 over all weights of a module. Each weight contributes its name, dtype and values."""
    total = sha256()
    for name, tensor in module.state_dict().items():
        total.update(f"{name} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _is_intact(path: Path) -> bool:
    """Return whether a cache file exists and its moments have the recorded checksum.

    Log a warning if the file exists but cannot be read, or if its moments have another checksum.

    Files of earlier versions of this package have no checksum, and count as intact if their moments can be read.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            mean, std = file.get_slice("mean"), file.get_slice("std")
            found = _checksum(mean, std, mean.get_shape()[0])
            intact = bool((file.metadata() or {}).get(CHECKSUM, found) == found)
    except (OSError, SafetensorError, RuntimeError):
        intact = False
    if not intact:
        log.warning("the cached latents %s are damaged: the photos are encoded again", path)
    return intact


def _checksum(mean: Any, std: Any, rows: int) -> str:
    """Return a hex SHA-256 of moments, which are tensors or slices of a file. Only CHUNK rows are in memory at once."""
    total = sha256()
    for moments in (mean, std):
        for first in range(0, rows, CHUNK):
            chunk = moments[first:first + CHUNK]
            total.update(f"{chunk.dtype} {tuple(chunk.shape)}".encode())
            total.update(chunk.contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _write(path: Path, mean: Tensor, std: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.write_file(path) as temporary:
        save_file({"mean": mean, "std": std}, temporary, metadata={CHECKSUM: _checksum(mean, std, len(mean))})


def _concatenate(chunks: Iterator[Moments], device: torch.device | None, rows: int) -> Moments:
    """Return the moments of all chunks on a device; None: on that of the chunks.

    Args:
        rows: number of rows of all chunks, so that no moments are in memory twice.
    """
    parts: list[Tensor] = []
    start = 0
    for chunk in chunks:
        parts = parts or [part.new_empty((rows, *part.shape[1:]), device=device or part.device) for part in chunk]
        end = start + len(chunk[0])
        for whole, part in zip(parts, chunk, strict=True):
            whole[start:end] = part
        start = end
    mean, std = parts
    return mean, std


def _read_rows(paths: Sequence[Path], file_rows: int, rows: Sequence[int], device: torch.device | None) -> Moments:
    """Read the given rows of a cache. Row i is row i % file_rows of file i // file_rows.

    Each call maps the files into memory again. The operating system caches the pages of the files.
    """
    found: dict[int, Moments] = {}
    for number in {row // file_rows for row in rows}:
        with safe_open(paths[number], "pt") as file:
            slices = [file.get_slice(name) for name in ("mean", "std")]
            for row in rows:
                if row // file_rows == number:
                    mean, std = (one[row % file_rows] for one in slices)
                    found[row] = mean, std
    means, stds = zip(*(found[row] for row in rows), strict=True)
    return torch.stack(means).to(device), torch.stack(stds).to(device)
