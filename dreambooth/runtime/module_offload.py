"""Parts that the training step does not use: in host memory while it runs, on the device while somebody needs them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Idle:
    """The VAE once latents are cached, the frozen text encoder once texts are; the UNet meanwhile.
    On a CPU the moves cost nothing."""

    modules: Sequence[nn.Module]
    device: torch.device  # that the run trains on

    def rest(self) -> None:
        """Free the device of them."""
        self._move(torch.device("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # else what they leave stays cut into pieces of their size

    @contextmanager
    def present(self) -> Iterator[None]:
        """All of them on the device, to sample with."""
        self._move(self.device)
        try:
            yield
        finally:
            self.rest()

    @contextmanager
    def absent(self) -> Iterator[None]:
        """None of them on the device, while others need the room."""
        self.rest()
        try:
            yield
        finally:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device)
