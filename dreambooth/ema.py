"""Exponential moving average of every trained weight, in fp32.

decay_t = min(ema_decay, (1 + t) / (10 + t)) at the t-th update, t = 1, 2, ...: fast at first, then slow.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of the trainable parameters of a module, by name."""

    def __init__(self, model: nn.Module, decay: float, device: torch.device | None = None) -> None:
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(device=device, dtype=torch.float32, copy=True)
            for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    def decay_at(self, update: int) -> float:
        """The decay of update `update`, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Fold the weights after an optimizer step into the averages."""
        self.updates += 1
        weight = 1 - self.decay_at(self.updates)
        for name, parameter in model.named_parameters():
            if name in self.average:
                average = self.average[name]
                average.lerp_(parameter.detach().to(average), weight)

    def swapped_into(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the module compute with the averages; its own weights come back untouched, bit for bit."""
        return swapped(self.average, model)


@contextmanager
def swapped(weights: Mapping[str, Tensor], model: nn.Module) -> Iterator[None]:
    """Let the module compute with these weights, by name; its own come back untouched, bit for bit."""
    live = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    kept = {name: parameter.data for name, parameter in live.items()}
    try:
        for name, parameter in live.items():
            parameter.data = weights[name].to(parameter)
        yield
    finally:
        for name, parameter in live.items():
            parameter.data = kept[name]
