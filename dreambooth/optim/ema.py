"""Exponential moving average of every trained weight, in fp32.

decay_t = min(ema_decay, (1 + t) / (10 + t)) at the t-th step, t = 1, 2, ...: fast at first, then slow.

With `every` = k the weights are folded in after each k-th step only, with the decay of all k: with d the product of
their decays, average = d * average + (1 - d) * weights. The same as every step if the weights had kept, for k steps,
the value that they have at the end of them; so the weights of the steps between are not in the average.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of trained weights, by name: of a module's parameters, or of tensors by name."""

    def __init__(self, weights: nn.Module | Mapping[str, Tensor], decay: float, device: torch.device | None = None,
                 every: int = 1) -> None:
        self.decay = decay
        self.every = every
        self.updates = 0  # optimizer steps seen
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(device=device, dtype=torch.float32, copy=True)
            for name, parameter in _named(weights).items() if parameter.requires_grad
        }

    def decay_at(self, update: int) -> float:
        """The decay of step `update`, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        """Fold the weights after an optimizer step into the averages, if it is a step to do so."""
        self.updates += 1
        if self.updates % self.every:
            return
        weight = 1 - math.prod(self.decay_at(self.updates - back) for back in range(self.every))
        alike: tuple[list[Tensor], list[Tensor]] = [], []  # in one call, which on a GPU is a few kernels
        for name, parameter in _named(weights).items():
            if name in self.average:
                average, live = self.average[name], parameter.detach()
                if live.device == average.device and live.dtype == average.dtype:
                    alike[0].append(average)
                    alike[1].append(live)
                else:  # one at a time: a copy of each is made
                    average.lerp_(live.to(average), weight)
        if alike[0]:
            torch._foreach_lerp_(*alike, weight)

    def swapped_into(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the module compute with the averages; its own weights come back untouched, bit for bit."""
        return swapped(model, self.average)


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor], exact: bool = False) -> Iterator[None]:
    """Other weights in a module for a while; its own come back untouched, bit for bit.

    Args:
        exact: in the precision and on the device that `weights` have: to be written, not computed with.
    """
    live = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    where = {name: parameter.device for name, parameter in live.items()}
    kept: dict[str, Tensor] = {}
    try:
        for name, parameter in live.items():
            kept[name] = parameter.data.to(weights[name].device)  # averages from the host: the device holds one set
            parameter.data = weights[name].detach() if exact else weights[name].detach().to(parameter)
        yield
    finally:
        for name, data in kept.items():
            live[name].data = data.to(where[name])


def _named(weights: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
