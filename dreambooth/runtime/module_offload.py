"""Keeps modules in host memory while they are not used, and moves them to the device when they are needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dreambooth.runtime.mapped_weights import release_pages


@dataclass
class ModuleOffload:
    """Modules that are kept in host memory, and moved to the device only when they are needed.

    During training, the VAE is offloaded if latents are cached, and the frozen text encoder if its outputs are cached.
    While the caches are filled, the UNet is offloaded. On a CPU, nothing is moved, but the resident pages of weights
    that are mapped from files are released until they are used again (mapped_weights.py).

    Attributes:
        modules: the modules to move.
        device: the device that the run trains on.
    """

    modules: Sequence[nn.Module]
    device: torch.device

    def to_host(self) -> None:
        """Move the modules to host memory."""
        self._move(torch.device("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # otherwise the allocator keeps the freed memory, in blocks of the modules' sizes
        elif self.device.type == "cpu":
            release_pages(self.modules)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Move the modules to the device for a `with` block, for example for sampling, then back to host memory."""
        self._move(self.device)
        try:
            yield
        finally:
            self.to_host()

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Move the modules to host memory for a `with` block, to make room for others, then back to the device."""
        self.to_host()
        try:
            yield
        finally:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device)
