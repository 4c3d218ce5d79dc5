"""Exponential moving average (EMA) of every trained weight, in fp32.

The decay of step t = 1, 2, ... is min(ema_decay, (1 + t) / (10 + t)). The averages therefore follow the weights quickly
at first, and slowly later.

With `every` = k, the averages are updated only after each k-th step: average = d * average + (1 - d) * weights, where d
is the product of the decays of the last k steps. This is equal to k updates in a row: each has the decay of one of
these k steps, and all use the weights after the k-th step. The weights after the other k - 1 steps do not enter the
average. After any other step, `current` returns a copy of the averages, updated for the steps since the last update.
Such a step can also be the last step of a run, because steps that the loss scaler skips (fp16) are not counted.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving averages of trained parameters. The attribute `average` stores them by parameter name.

    Args:
        weights: a module, or tensors by name; only parameters with requires_grad are averaged.
        decay: upper limit of the decay.
        device: device of the averages; None: each average is on the device of its weight.
        every: number of optimizer steps per update of the averages.
    """

    def __init__(self, weights: nn.Module | Mapping[str, Tensor], decay: float, device: torch.device | None = None,
                 every: int = 1) -> None:
        self.decay = decay
        self.every = every
        self.updates = 0  # optimizer steps so far
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(device=device, dtype=torch.float32, copy=True)
            for name, parameter in _named(weights).items() if parameter.requires_grad
        }

    def decay_at(self, update: int) -> float:
        """Return the decay of an optimizer step; `update` is the step's number, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        """Count an optimizer step; after each `every`-th step, update the averages with the current weights."""
        self.updates += 1
        if not self.updates % self.every:
            self._add(weights, self.every, self.average)

    @torch.no_grad()
    def current(self, weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the averages, including the steps since the last update of the averages.

        If there are such steps, the result is a copy: the averages of the training state do not change, so that the
        result of a run does not depend on when it is sampled or stopped.

        Args:
            weights: the current weights.
        """
        pending = self.updates % self.every
        if not pending:
            return self.average
        averages = {name: average.clone() for name, average in self.average.items()}
        self._add(weights, pending, averages)
        return averages

    def _add(self, weights: nn.Module | Mapping[str, Tensor], steps: int, into: dict[str, Tensor]) -> None:
        """Update the averages `into` with the current weights, for the last `steps` optimizer steps."""
        weight = 1 - math.prod(self.decay_at(self.updates - back) for back in range(steps))
        # Weights with the device and dtype of their averages share one foreach call, which is a few kernels on a GPU.
        averages: list[Tensor] = []
        lives: list[Tensor] = []
        for name, parameter in _named(weights).items():
            if name in into:
                average, live = into[name], parameter.detach()
                if live.device == average.device and live.dtype == average.dtype:
                    averages.append(average)
                    lives.append(live)
                else:  # one weight at a time, because each needs a temporary copy
                    average.lerp_(live.to(average), weight)
        if averages:
            torch._foreach_lerp_(averages, lives, weight)

    def swap_into(self, model: nn.Module) -> AbstractContextManager[None]:
        """Replace the model's weights by the averages in a `with` block; on exit, restore its weights bit for bit."""
        return swap_weights(model, self.current(model))


@contextmanager
def swap_weights(model: nn.Module, weights: Mapping[str, Tensor], exact: bool = False) -> Iterator[None]:
    """Replace a module's weights by `weights` in a `with` block; on exit, restore its own weights bit for bit.

    Args:
        exact: keep the precision and the device of `weights`, to write them to a file. By default the weights are cast
            to the module's precision and moved to its device, to compute with them.
    """
    live = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    devices = {name: parameter.device for name, parameter in live.items()}
    saved: dict[str, Tensor] = {}
    try:
        for name, parameter in live.items():
            # If the averages are in host memory, the live weights move there: the device holds only one set of weights.
            # With memory.fully_shard, the live weights are shapes without memory, which `to` would fill.
            own = parameter.data
            saved[name] = own if own.untyped_storage().nbytes() < own.nbytes else own.to(weights[name].device)
            parameter.data = weights[name].detach() if exact else weights[name].detach().to(parameter)
        yield
    finally:
        for name, data in saved.items():
            live[name].data = data.to(devices[name])


def _named(weights: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
