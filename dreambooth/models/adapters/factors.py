"""The weights of LoKr and LoHa adapters, and what a layer with such an adapter computes.

Both change the weight W of a layer, a matrix (out, in), to W' = W + s D (Yeh et al. 2024, LyCORIS, arXiv:2309.14859,
section 3). The weight of a convolution is flattened to a matrix (out, in * height * width).

    LoKr:  D = C (x) B           Kronecker product; C (l, m), B (k, n), l k = out, m n = in
    LoHa:  D = (A1 B1) o (A2 B2)    element-wise product; A1 and A2 (out, rank), B1 and B2 (rank, in)

In LoKr, a block of D is a multiple of B: rows i k ... i k + k - 1 and columns j n ... j n + n - 1 are C[i, j] B. If B
is large, it is a product of two matrices of method.rank; with method.decompose_both also C.

LoHa is FedPara (Hyeon-Woo et al. 2022, arXiv:2108.06098, proposition 1). It is also a LoRA of rank r * r, without an
approximation, because

    D[o, i] = sum over p and q of (A1[o, p] A2[o, q]) (B1[p, i] B2[q, i])

The rows of `LowRank.down` are the products of all pairs of rows of B1 and B2, the columns of `LowRank.up` those of all
pairs of columns of A1 and A2. A step computes LoHa in this form: D itself, a matrix as large as W, would have to be
kept for the backward pass. D of LoKr is not computed either, see `kronecker_output`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoKr:
    """The LoKr of one layer: W' = W + C (x) B.

    Attributes:
        left: C, (l, m); or two matrices (l, rank) and (rank, m) whose product C is. C contains the scale s.
        right: B, (k, n), of a convolution (k, n, height, width); or two matrices (k, rank) and (rank, n * height *
            width) whose product B is.
        kernel: height and width of a convolution's kernel; () for a linear layer.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    kernel: tuple[int, ...] = ()

    magnitude = None  # LoKr has no magnitudes

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """C and B, each as one tensor."""
        right = self.right[0] if len(self.right) == 1 else self.right[0] @ self.right[1]
        return (self.left[0] if len(self.left) == 1 else self.left[0] @ self.left[1],
                right.reshape(len(right), -1, *self.kernel))

    @property
    def delta(self) -> Tensor:
        """The Kronecker product of C and B, in the shape of the layer's weight."""
        left, right = self.matrices
        product = torch.kron(left, right.flatten(1))
        return product.reshape(len(product), -1, *self.kernel)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the layer's weight with the adapter merged into it."""
        return weight + self.delta.to(weight).reshape(weight.shape)


@dataclass(frozen=True)
class LoHa:
    """The LoHa of one layer: W' = W + (A1 B1) o (A2 B2), an element-wise product. A2 contains the scale s.

    Attributes:
        first: A1, (out, rank), and B1, (rank, in), of a convolution (rank, in * height * width).
        second: A2 and B2, with the same shapes.
        kernel: height and width of a convolution's kernel; () for a linear layer.
    """

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    kernel: tuple[int, ...] = ()

    magnitude = None  # LoHa has no magnitudes

    @property
    def delta(self) -> Tensor:
        """The element-wise product of the two matrix products, in the shape of the layer's weight."""
        product = (self.first[0] @ self.first[1]) * (self.second[0] @ self.second[1])
        return product.reshape(len(product), -1, *self.kernel)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the layer's weight with the adapter merged into it."""
        return weight + self.delta.to(weight).reshape(weight.shape)


def pairwise_products(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return `down`, (rank * rank, in), and `up`, (out, rank * rank), of the LoRA that equals a LoHa."""
    (a1, b1), (a2, b2) = first, second
    down = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
    up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    return down, up


def kronecker_output(layer: nn.Module, values: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return what the product of C and B adds to the output of `layer`, without computing the product.

    The inputs of a value are m groups of n. With X the inputs as a matrix (m, n), the output is the matrix C X B^T,
    (l, k), row by row.

    Args:
        layer: the linear layer or convolution that has the adapter.
        values: its input.
        left, right: see `LoKr`.
    """
    groups, size = left[-1].shape[-1], right[-1].shape[1]
    if isinstance(layer, nn.Conv2d):
        count, _, height, width = values.shape
        size = values.shape[1] // groups
        values = _convolve(layer, values.reshape(count * groups, size, height, width), right, size)
        inner, (height, width) = values.shape[1], values.shape[2:]
        values = values.reshape(count, groups, inner * height * width)
        for matrix in reversed(left):
            values = matrix @ values
        return values.reshape(count, -1, height, width)
    shape = values.shape[:-1]
    values = values.reshape(*shape, groups, size)
    for matrix in reversed(right):
        values = F.linear(values, matrix)
    values = values.mT
    for matrix in reversed(left):
        values = F.linear(values, matrix)
    return values.mT.reshape(*shape, -1)


def low_rank_output(layer: nn.Module, values: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return what the product of `up` (out, rank) and `down` (rank, ...) adds to the output of `layer`."""
    if isinstance(layer, nn.Conv2d):
        return _convolve(layer, values, (up, down), values.shape[1])
    return F.linear(F.linear(values, down), up)


def _convolve(layer: nn.Conv2d, values: Tensor, matrices: Sequence[Tensor], channels: int) -> Tensor:
    """Convolve `values` with the last of `matrices`, with the settings of `layer`; then multiply by the others.

    Args:
        channels: number of input channels of `values`.
    """
    height, width = layer.kernel_size
    settings: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    values = F.conv2d(values, matrices[-1].reshape(-1, channels, height, width), **settings)
    for matrix in reversed(matrices[:-1]):
        values = F.conv2d(values, matrix.reshape(*matrix.shape, 1, 1))
    return values
