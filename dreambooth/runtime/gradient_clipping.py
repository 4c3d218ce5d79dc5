"""Clipping of gradients by their global norm, which reads the gradients once less than PyTorch's functions."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

EPSILON = 1e-6  # added to the norm, as in torch.nn.utils.clip_grad_norm_


def clip(parameters: Iterable[Tensor], limit: float | None, optimizer: torch.optim.Optimizer) -> Tensor:
    """Clip the global norm of the gradients to `limit`, and return the norm before clipping (0-d).

    Fused AdamW divides the gradients by `divisor` in the pass in which its next step reads them: this function sets its
    attribute `grad_scale`, and leaves the gradients as they are. For other optimizers they are divided here.

    Args:
        limit: None: only the norm is computed.
        optimizer: the optimizer whose next step, and no other, uses these gradients.
    """
    trained = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = total_norm(gradients)
    if _is_sharded(norm):
        if limit is not None:
            nn.utils.clip_grads_with_norm_(trained, limit, norm)
        whole: Tensor = norm.full_tensor()  # type: ignore[attr-defined]
        return whole
    number = divisor(norm, limit) if limit is not None and gradients else None
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"] and norm.dtype is torch.float32:
        optimizer.grad_scale = number  # type: ignore[attr-defined]
    elif number is not None:
        torch._foreach_div_(gradients, number)
    return norm


def divisor(norm: Tensor, limit: float) -> Tensor:
    """Return max(1, (norm + 1e-6) / limit), 0-d: gradients of this global norm, divided by it, are clipped to `limit`.

    It is the inverse of the factor of torch.nn.utils.clip_grad_norm_.
    """
    return ((norm + EPSILON) / limit).clamp(min=1)


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, 0-d: the norm of the vector of their norms."""
    if gradients and all(map(_is_whole_on_cpu, gradients)):
        whole: Tensor = torch.linalg.vector_norm(torch.stack([gradient_norm(gradient) for gradient in gradients]))
        return whole
    return nn.utils.get_total_norm(gradients)


def gradient_norm(gradient: Tensor) -> Tensor:
    """Return the Euclidean norm of one gradient, 0-d.

    On a CPU, PyTorch computes a norm with one thread. The scalar product of a gradient with itself uses all threads,
    for gradients in fp32.
    """
    if _is_whole_on_cpu(gradient) and gradient.dtype is torch.float32 and gradient.is_contiguous():
        row = gradient.view(-1)
        return torch.dot(row, row).sqrt()
    return torch._foreach_norm([gradient])[0]


def _is_whole_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not _is_sharded(tensor)


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as with memory.fully_shard."""
    return hasattr(tensor, "full_tensor")
