"""Gradient checkpointing of a diffusers UNet: activations are recomputed in the backward pass instead of stored.

diffusers recomputes only the layers inside a transformer (Transformer2DModel). It stores the tensors that the norm and
the projections of the transformer need: 25 MiB for one transformer of 320 channels, with two samples in half
precision and 64 x 64 latents. With diffusers' checkpointing, such tensors of all transformers are 50 % of what the
forward pass stores. This module recomputes the whole transformer from its input, which the neighbouring block stores
anyway. The same operators run on the same values, so the results do not change.

With two groups (argument `groups` of `recompute`), a transformer is recomputed for the photos first and then for the
class images, so that its inner tensors exist for one group at a time. Autograd adds the gradients that both groups give
for a weight, and runs the weight's hooks once, with this sum. The terms of the sum are added in another order than
without groups; the docstring of `_forward_backward_halves` in training/step.py gives the error bound.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute(unet: Any, groups: int = 1) -> None:
    """Enable gradient checkpointing: each residual block and each transformer is recomputed as one unit.

    Args:
        groups: number of parts into which a batch is split. Activations are recomputed for one part at a time.
    """
    unet.enable_gradient_checkpointing()
    for module in unet.modules():
        if hasattr(module, "transformer_blocks"):
            module.gradient_checkpointing = False  # no second checkpointing of the layers inside
            module.forward = partial(_checkpointed, module.forward, groups)


def _checkpointed(forward: Callable[..., Any], groups: int, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    groups = min(groups, len(args[0]))  # with output preservation, there may be steps of one sample
    if groups == 1:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    parts = zip(*(_split(value, groups) for value in (*args, *kwargs.values())), strict=True)
    outputs = [checkpoint(forward, *part[:len(args)], use_reentrant=False,
                          **dict(zip(kwargs, part[len(args):], strict=True))) for part in parts]
    return tuple(torch.cat(rows) for rows in zip(*outputs, strict=True))


def _split(value: Any, groups: int) -> list[Any]:
    """Split a tensor along the batch dimension into `groups` parts; repeat any other value `groups` times."""
    return list(value.chunk(groups)) if isinstance(value, Tensor) else [value] * groups
