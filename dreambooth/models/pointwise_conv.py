"""Convolutions of one pixel as what they are, matrix products: on a CPU that is faster.

oneDNN puts weights, pixels and gradients of a convolution into an order of its own at every call, and here there is
little else to do: forward and backward of the tiny base's layers take a half to two thirds of the time, all those of
Stable Diffusion 1.5 at 256 px a tenth to a fifth less (docs/benchmarks.md).
"""

import torch
from torch import Tensor, nn

CHANNELS_A_PIXEL = 8  # measured; with more output channels, each picture's gradient of the weights takes too long


class Pointwise(nn.Conv2d):
    """y = W x + b for every pixel.

    The same sums as the convolution's, in another order: with u the unit roundoff (2**-24 in fp32), a value of n
    products and a bias is off by at most gamma_(n + 1) (|W| |x| + |b|), gamma_k = k u / (1 - k u), in either (Higham
    2002, eq. 3.5), so the two differ by twice that at most.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count, channels, height, width = input.shape
        if len(weight) > CHANNELS_A_PIXEL * height * width:
            convolved: Tensor = super()._conv_forward(input, weight, bias)
            return convolved
        pixels, matrices = input.flatten(2), weight.view(1, -1, channels).expand(count, -1, -1)
        found = torch.bmm(matrices, pixels) if bias is None else torch.baddbmm(bias.view(-1, 1), matrices, pixels)
        return found.view(count, -1, height, width)


def as_products(model: nn.Module) -> None:
    """Compute the convolutions of one pixel in `model` so from now on; its weights and their names stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and (module.kernel_size, module.stride, module.padding, module.groups) == (
                (1, 1), (1, 1), (0, 0), 1):
            module.__class__ = Pointwise
