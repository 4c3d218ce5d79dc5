"""Loads the state of an optimizer in the memory layout that its kernels expect."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def load_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state that was read from files, whose tensors are contiguous and in host memory.

    Fused kernels and bitsandbytes assume that a weight and its state have the same strides. Paged optimizers assume
    that their state is in pageable memory: bitsandbytes allocates it there before the first step, but its
    `load_state_dict` puts a loaded state into the memory of the GPU.
    """
    if getattr(optimizer, "is_paged", False):
        optimizer.load_state_dict(saved, move_to_device=False)  # type: ignore[arg-type, call-arg]
        _page(optimizer)
    else:
        optimizer.load_state_dict(dict(saved))
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if not isinstance(value, Tensor) or getattr(value, "is_paged", False):
                continue
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


@torch.no_grad()
def _page(optimizer: Any) -> None:
    """Move the state of a paged optimizer of bitsandbytes into buffers that its own steps would have allocated."""
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if name in ("state1", "state2"):  # of the weight's shape; half weights have no elements between steps
                like = torch.empty(value.shape, dtype=value.dtype, device=parameter.device)
                entries[name] = optimizer.get_state_buffer(like, dtype=value.dtype).copy_(value)
            elif isinstance(value, Tensor):
                entries[name] = value.to(parameter.device)
