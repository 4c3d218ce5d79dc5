"""Where cached latents live: on the device, in host memory, or memory-mapped from a file that later runs find again.

What is cached is the distribution (mean and standard deviation), not a sample of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dreambooth.config.enums import LatentCache
from dreambooth.utils import atomic_files

Moments = tuple[Tensor, Tensor]  # mean and standard deviation of the latents, (N, C, h, w) each
Rows = Callable[[list[int]], Moments]  # rows -> their moments, on the device that encoded them


@dataclass(frozen=True)
class Keep:
    """Takes the moments of a set of pictures into the cache.

    A file is named by its pictures' content and size, in order, and by the encoder's weights: another photo, crop or
    VAE is another file, and the same ones are encoded once for all runs.
    """

    where: LatentCache = LatentCache.device
    device: torch.device | None = None  # that latents are handed out on; None: where they were made
    folder: Path | None = None  # of the files, for `disk`
    encoder: str = ""  # digest of the encoder

    def __call__(self, content: Sequence[str], encoded: Callable[[], Iterator[Moments]]) -> Rows:
        """Args:
            content: what tells these pictures from others.
            encoded: encodes them, chunk by chunk.
        """
        if self.where is LatentCache.disk and self.folder is not None:
            name = sha256("\n".join([self.encoder, *content]).encode()).hexdigest()[:20]
            path = self.folder / f"{name}.safetensors"
            if not path.is_file():
                mean, std = _joined(encoded(), torch.device("cpu"))
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_files.whole_file(path) as aside:
                    save_file({"mean": mean.contiguous(), "std": std.contiguous()}, aside)
            return lambda rows: _read(path, rows, self.device)
        mean, std = _joined(encoded(), torch.device("cpu") if self.where is LatentCache.cpu else None)
        return lambda rows: (mean[rows].to(self.device), std[rows].to(self.device))


def digest(module: nn.Module) -> str:
    """Hex digits over every weight of a module and its precision."""
    found = sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _joined(chunks: Iterator[Moments], device: torch.device | None) -> Moments:
    means, stds = zip(*((mean.to(device), std.to(device)) for mean, std in chunks), strict=True)
    return torch.cat(means), torch.cat(stds)


def _read(path: Path, rows: list[int], device: torch.device | None) -> Moments:
    """Only these rows are read; the file is mapped anew each time, the system keeps its pages."""
    with safe_open(path, "pt") as found:
        mean, std = (torch.stack([found.get_slice(name)[row] for row in rows]) for name in ("mean", "std"))
    return mean.to(device), std.to(device)
