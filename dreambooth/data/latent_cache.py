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
Moments = tuple[Tensor, Tensor]  # mean and standard deviation of the latents, (N, C, h, w) each
ReadRows = Callable[[list[int]], Moments]  # takes row numbers, returns the moments of these rows on LatentStore.device


@dataclass(frozen=True)
class LatentStore:
    """Stores the latent moments (mean and standard deviation) of a set of images, one row per image.

    The name of a cache file is a hash of the content and size of all images, in order, and of the weights of the VAE
    encoder. A different photo, crop or VAE therefore gives a different file, and runs with the same images and VAE
    share one file.
    """

    where: LatentCache = LatentCache.device
    device: torch.device | None = None  # device to which rows are copied when read; None: not copied
    folder: Path | None = None  # folder of the cache files; used only with LatentCache.disk
    encoder: str = ""  # result of `digest` for the VAE encoder

    def __call__(self, content: Sequence[str], encode_chunks: Callable[[], Iterator[Moments]]) -> ReadRows:
        """Store the moments of one set of images, and return a function that reads selected rows.

        Args:
            content: strings that identify the images, such as hashes of their pixels.
            encode_chunks: encodes the images and yields their moments in chunks; not called if the cache file exists.
        """
        if self.where is LatentCache.disk and self.folder is not None:
            name = sha256("\n".join([self.encoder, *content]).encode()).hexdigest()[:20]
            path = self.folder / f"{name}.safetensors"
            if not _is_intact(path):
                mean, std = _concatenate(encode_chunks(), torch.device("cpu"))
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_files.write_file(path) as temporary:
                    save_file({"mean": mean.contiguous(), "std": std.contiguous()}, temporary,
                              metadata={CHECKSUM: _checksum(mean, std, len(mean))})
            return lambda rows: _read_rows(path, rows, self.device)
        mean, std = _concatenate(encode_chunks(), torch.device("cpu") if self.where is LatentCache.cpu else None)
        return lambda rows: (mean[rows].to(self.device), std[rows].to(self.device))


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


def _concatenate(chunks: Iterator[Moments], device: torch.device | None) -> Moments:
    means, stds = zip(*((mean.to(device), std.to(device)) for mean, std in chunks), strict=True)
    return torch.cat(means), torch.cat(stds)


def _read_rows(path: Path, rows: list[int], device: torch.device | None) -> Moments:
    """Read the given rows of a cache file.

    Each call maps the file into memory again. The operating system caches the pages of the file.
    """
    with safe_open(path, "pt") as file:
        mean, std = (torch.stack([file.get_slice(name)[row] for row in rows]) for name in ("mean", "std"))
    return mean.to(device), std.to(device)
