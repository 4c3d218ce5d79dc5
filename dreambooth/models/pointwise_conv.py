"""Convolutions with a kernel of one pixel, computed as matrix products, which is faster on a CPU.

oneDNN reorders weights, pixels and gradients of a convolution at every call, and such a convolution computes little
else: as products, forward and backward of the tiny base's layers take a half to two thirds of the time, and all those
of Stable Diffusion 1.5 at 256 px a tenth to a fifth less (docs/benchmarks.md).
"""

import torch
from torch import Tensor, nn

# Measured: with more output channels per pixel, each picture's gradient of the weights takes too long.
MAX_CHANNELS_PER_PIXEL = 8


class PointwiseConv2d(nn.Conv2d):
    """y = W x + b for every pixel.

    It adds the same products as the convolution, in another order. With u the unit roundoff (2**-24 in fp32), a value
    of n products and a bias is off by at most gamma_(n + 1) (|W| |x| + |b|), gamma_k = k u / (1 - k u), in either order
    (Higham 2002, eq. 3.5), so the two differ by at most twice that.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count, channels, height, width = input.shape
        if len(weight) > MAX_CHANNELS_PER_PIXEL * height * width:
            convolved: Tensor = super()._conv_forward(input, weight, bias)
            return convolved
        pixels, matrices = input.flatten(2), weight.view(1, -1, channels).expand(count, -1, -1)
        outputs = torch.bmm(matrices, pixels) if bias is None else torch.baddbmm(bias.view(-1, 1), matrices, pixels)
        return outputs.view(count, -1, height, width)


def use_matrix_products(model: nn.Module) -> None:
    """Make `model` compute its one-pixel convolutions as matrix products; names of weights do not change."""
    for module in model.modules():
        if type(module) is nn.Conv2d and (module.kernel_size, module.stride, module.padding, module.groups) == (
                (1, 1), (1, 1), (0, 0), 1):
            module.__class__ = PointwiseConv2d
