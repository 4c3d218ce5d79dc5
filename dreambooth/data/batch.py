"""What a step is given: one micro-batch, instance rows first, then as many class rows, on the training device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """All rows of one size; class rows of another size are apart."""

    latents: Tensor  # (N, C, h, w), scaled
    noise: Tensor  # (N, C, h, w)
    timesteps: Tensor  # (N,) int64
    text: Tensor  # (P, L) token ids, or (P, L, D) hidden states when text is cached: each of the next N / P rows
    instances: int
    mask: Tensor | None = None  # (N, 1, h, w) in [0, 1], what counts of the loss; None: everything
    apart: "Batch | None" = None  # the class rows, if their size is another: then all rows here are instance rows

    @property
    def count(self) -> int:
        """All rows."""
        return len(self.timesteps) + (self.apart.count if self.apart else 0)

    @property
    def with_prior(self) -> bool:
        return self.count > self.instances

    def halves(self) -> tuple["Batch", "Batch"]:
        """The instance rows and the class rows, each as a batch of its own."""
        if self.apart is not None:
            return replace(self, apart=None), self.apart
        return self._rows(0, self.instances), self._rows(self.instances, len(self.timesteps))

    def _rows(self, start: int, end: int) -> "Batch":
        latents, noise, timesteps = (tensor[start:end] for tensor in (self.latents, self.noise, self.timesteps))
        each = len(self.timesteps) // len(self.text)
        return Batch(latents, noise, timesteps, self.text[start // each:end // each], instances=len(timesteps),
                     mask=None if self.mask is None else self.mask[start:end])


def joined(parts: Sequence[Batch]) -> Batch:
    """The instance rows and, if there are any, the class rows as one batch."""
    first = parts[0]
    if len(parts) > 1 and parts[1].latents.shape[1:] != first.latents.shape[1:]:
        return replace(first, apart=parts[1])
    latents, noise, timesteps, text = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "noise", "timesteps", "text"))
    mask = None
    if any(part.mask is not None for part in parts):
        mask = torch.cat([torch.ones_like(part.latents[:, :1]) if part.mask is None else part.mask for part in parts])
    return Batch(latents, noise, timesteps, text, first.instances, mask)
