"""Dropout whose chance belongs to a sample: a function of its noisy latents, its timestep and the layer.

PyTorch's takes chance from the process: what is dropped then depends on what else was computed, on batches,
micro-batches and processes, and a resumed run would drop other things. A sample's noisy latents are its own at every
step, so they are the key here. The chance is hashed on the device: nothing is drawn, saved or read back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MASK = 0xFFFFFFFF  # 32 bits in an int64: products of two such fit as far as their low half, the only one kept
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)  # and shifts 16, 15, 16: a mixer of low bias (Wellons, hash-prospector, 2018)


class Dropout(nn.Module):
    """Sets each value to 0 with probability `p` and divides the rest by 1 - p (Srivastava et al. 2014), in training.

    `keys` (N,), int64, tell the samples of a batch apart; `follow` sets them.
    """

    def __init__(self, p: float, salt: int) -> None:
        super().__init__()
        self.p, self.salt = p, salt
        self.keys: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Drop from (N, ...)."""
        if not self.training or self.keys is None:
            return values
        return values * self._kept(values).to(values.dtype) / (1 - self.p)

    @torch.no_grad()
    def _kept(self, values: Tensor) -> Tensor:
        assert self.keys is not None
        places = torch.arange(values[0].numel(), device=values.device)
        chance = mixed(mixed(places ^ self.salt) ^ self.keys.to(values.device).view(-1, 1))
        return (chance >= int(self.p * 2**32)).view(values.shape)


def follow(model: nn.Module, dropouts: Sequence[Dropout]) -> None:
    """At each forward pass of `model` (latents, timesteps, text), tell `dropouts` its samples."""
    def tell(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keys = sample_keys(inputs[0], inputs[1])
        for dropout in dropouts:
            dropout.keys = keys

    model.register_forward_pre_hook(tell)


@torch.no_grad()
def sample_keys(latents: Tensor, timesteps: Tensor) -> Tensor:
    """A key (N,) of 32 bits for each sample, of the bits of its latents (N, ...) and its timestep (N,)."""
    bits = latents.detach().float().flatten(1).contiguous().view(torch.int32).long() & MASK
    places = torch.arange(bits.shape[1], device=bits.device)
    return mixed((mixed(bits ^ mixed(places)).sum(1) & MASK) ^ timesteps.long())


def mixed(words: Tensor) -> Tensor:
    """A hash of 32-bit words, held in int64."""
    for multiplier, shift in zip(MULTIPLIERS, (16, 15), strict=True):
        words = ((words ^ (words >> shift)) * multiplier) & MASK
    return words ^ (words >> 16)
