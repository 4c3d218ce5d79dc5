"""Finds values that are NaN or infinite, before they are saved, drawn or exported."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that contains NaN or infinity, or None if all values are finite.

    The function checks only the largest magnitude of each tensor, which is NaN or infinite if one of the values is.
    Computing it needs no temporary copy of the tensor, unless its numbers have 8 bits. The host waits once for each
    device.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            values = tensor.detach()
            if values.element_size() == 1:
                values = values.float()  # PyTorch computes no norm of 8-bit numbers
            largest = torch.linalg.vector_norm(values, ord=math.inf)
            by_device.setdefault(tensor.device, {})[name] = largest.float()
    for largest_values in by_device.values():
        finite = torch.stack(list(largest_values.values())).isfinite().tolist()
        for name, is_finite in zip(largest_values, finite, strict=True):
            if not is_finite:
                return name
    return None
