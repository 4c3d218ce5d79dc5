"""Dropout whose random numbers depend on the sample: on its noisy latents, its timestep and the layer.

PyTorch's dropout draws from the state of the process. What is dropped then depends on what else was computed: on batch
size, micro-batches and processes, and a resumed run would drop other values. The noisy latents of a sample are its own
at every step, so a hash of them is the key here. It is computed on the device: nothing is drawn, saved or read back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# 32 bits in an int64: the product of two such numbers overflows, and only its low half is used.
MASK = 0xFFFFFFFF
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)  # with shifts 16, 15, 16: a mixer of low bias (Wellons, hash-prospector, 2018)


class Dropout(nn.Module):
    """Sets each value to 0 with probability `p` and divides the rest by 1 - p (Srivastava et al. 2014), in training.

    Attributes:
        keys: (N,), int64: one key per sample of the current batch; `set_keys_before_forward` sets them.
    """

    def __init__(self, p: float, salt: int) -> None:
        """Args:
            salt: of the layer: layers drop different values of one sample.
        """
        super().__init__()
        self.p, self.salt = p, salt
        self.keys: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Drop values of a tensor (N, ...)."""
        if not self.training or self.keys is None:
            return values
        return values * self._keep_mask(values).to(values.dtype) / (1 - self.p)

    @torch.no_grad()
    def _keep_mask(self, values: Tensor) -> Tensor:
        assert self.keys is not None
        positions = torch.arange(values[0].numel(), device=values.device)
        numbers = hash_words(hash_words(positions ^ self.salt) ^ self.keys.to(values.device).view(-1, 1))
        return (numbers >= int(self.p * 2**32)).view(values.shape)


def set_keys_before_forward(model: nn.Module, dropouts: Sequence[Dropout]) -> None:
    """Set the keys of `dropouts` before each forward pass of `model` (latents, timesteps, text)."""
    def set_keys(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keys = sample_keys(inputs[0], inputs[1])
        for dropout in dropouts:
            dropout.keys = keys

    model.register_forward_pre_hook(set_keys)


@torch.no_grad()
def sample_keys(latents: Tensor, timesteps: Tensor) -> Tensor:
    """Return a 32-bit key per sample, (N,), from the bits of its latents (N, ...) and its timestep (N,)."""
    bits = latents.detach().float().flatten(1).contiguous().view(torch.int32).long() & MASK
    positions = torch.arange(bits.shape[1], device=bits.device)
    return hash_words((hash_words(bits ^ hash_words(positions)).sum(1) & MASK) ^ timesteps.long())


def hash_words(words: Tensor) -> Tensor:
    """Return a hash of each 32-bit word; words are held in int64."""
    for multiplier, shift in zip(MULTIPLIERS, (16, 15), strict=True):
        words = ((words ^ (words >> shift)) * multiplier) & MASK
    return words ^ (words >> 16)
