"""Dropout whose random numbers are a function of a sample's noisy latents, its timestep and the layer.

PyTorch's dropout draws random numbers from the generator of the process. The dropped values then depend on the batch
size, the micro-batches and the number of processes, and a resumed run would not drop the same values as an
uninterrupted run. The noisy latents are different for every sample and step, so this module uses a hash of the latents
and the timestep as the key of the random numbers. The hash is computed on the device: no random state is saved, and
nothing is read back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The low 32 bits of an int64. The product of two 32-bit numbers overflows an int64; only its low 32 bits are used.
MASK = 0xFFFFFFFF
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)  # with shifts 16, 15, 16: a hash of low bias (Wellons, hash-prospector, 2018)


class Dropout(nn.Module):
    """In training, sets each value to 0 with probability `p` and divides the others by 1 - p (Srivastava et al. 2014).

    Attributes:
        keys: (N,), int64: one key per sample of the current batch, set by the hook of `set_keys_before_forward`.
    """

    def __init__(self, p: float, salt: int) -> None:
        """Args:
            p: probability that a value is dropped.
            salt: a number that differs between layers, so that they drop different values of a sample.
        """
        super().__init__()
        self.p, self.salt = p, salt
        self.keys: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Apply dropout to a tensor (N, ...) of N samples."""
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
    """Register a hook that sets the keys of `dropouts` before each forward pass of `model`.

    The first two arguments of the forward pass must be the noisy latents and the timesteps.
    """
    def set_keys(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keys = sample_keys(inputs[0], inputs[1])
        for dropout in dropouts:
            dropout.keys = keys

    model.register_forward_pre_hook(set_keys)


@torch.no_grad()
def sample_keys(latents: Tensor, timesteps: Tensor) -> Tensor:
    """Return one 32-bit key per sample, (N,): a hash of the bits of `latents` (N, ...) and of `timesteps` (N,)."""
    bits = latents.detach().float().flatten(1).contiguous().view(torch.int32).long() & MASK
    positions = torch.arange(bits.shape[1], device=bits.device)
    return hash_words((hash_words(bits ^ hash_words(positions)).sum(1) & MASK) ^ timesteps.long())


def hash_words(words: Tensor) -> Tensor:
    """Return a 32-bit hash of each 32-bit word. Words and hashes are stored as int64."""
    for multiplier, shift in zip(MULTIPLIERS, (16, 15), strict=True):
        words = ((words ^ (words >> shift)) * multiplier) & MASK
    return words ^ (words >> 16)
