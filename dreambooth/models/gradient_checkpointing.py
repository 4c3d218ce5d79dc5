"""Gradient checkpointing: activations are computed again in the backward pass instead of being kept.

diffusers recomputes the layers inside a transformer and keeps what its norm and projections need: 25 MiB for each at 64
x 64 latents in half precision, half of all that a checkpointed forward pass keeps. Here a transformer is recomputed as
a whole, from its input, which a neighbour keeps anyway. The same operators on the same values: no number changes.

In groups, a transformer is recomputed for the photos, then for the class images: its own tensors exist for one group at
a time. The gradient of a weight is the sum over both, which autograd hands on once. Its terms are added in another
order, with the bound of step._forward_backward_halves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute(unet: Any, groups: int = 1) -> None:
    """Switch it on for a UNet: each residual block and each transformer is a unit, for `groups` parts of a batch."""
    unet.enable_gradient_checkpointing()
    for module in unet.modules():
        if hasattr(module, "transformer_blocks"):
            module.gradient_checkpointing = False  # of the layers inside
            module.forward = partial(_recomputed, module.forward, groups)


def _recomputed(forward: Callable[..., Any], groups: int, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if groups == 1:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    parts = zip(*(_chunks(value, groups) for value in (*args, *kwargs.values())), strict=True)
    found = [checkpoint(forward, *part[:len(args)], use_reentrant=False,
                        **dict(zip(kwargs, part[len(args):], strict=True))) for part in parts]
    return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


def _chunks(value: Any, groups: int) -> list[Any]:
    return list(value.chunk(groups)) if isinstance(value, Tensor) else [value] * groups
